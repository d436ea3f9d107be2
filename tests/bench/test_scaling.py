"""The estimates of scaling compared with small real runs.

Compared are the bytes that two workers exchange, the memory of tables, and orders.
"""

import contextlib
import os
import socket
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch.nn.parallel import DistributedDataParallel

from bench.scaling import memory, orders, traffic
from bench.scaling.__main__ import METHOD_CASES, main
from bench.scaling.cost import NetworkSpeed
from bench.scaling.traffic import (
    CollectiveMessage,
    get_real_collectives,
    list_gradient_messages,
    make_worker_batch,
    record_collectives,
    run_step,
    simulate_step,
)
from firstlight.pipeline.data.order.id_set import make_id_set
from firstlight.pipeline.data.order.lane_plan import _order_groups
from firstlight.pipeline.data.plan import _shuffle_epoch
from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.memory_bank import MemoryBank
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.pretrain.method import Method, TrainingInfo
from tests.support.gloo import Pool

SIDE, ROWS = 16, 6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nat": ("nat", {"dim": 12, "hidden": (8,), "pool": "avg"}),
    "nat, local": ("nat", {"dim": 12, "hidden": (8,), "pool": "avg", "assign": "local"}),
    "nat, one_hot": ("nat", {"dim": 12, "hidden": (8,), "targets": "one_hot"}),
    "nat, sync": ("nat", {"dim": 12, "hidden": (8,), "norm": "sync"}),
    "spatial_contrasting": ("spatial_contrasting", {"patch_size": 2}),
    "clustering_locality": ("clustering_locality", {}),
    "dae": ("dae", {}),
    "super_and": ("super_and", {"dim": 12}),
    "super_and, reference": ("super_and", {"dim": 12, "variant": "reference"}),
    "instance": ("super_and", {"dim": 12, "neighbours": False, "ue": False, "aug": False, "rounds": 1}),
}  # fmt: skip


def build_method(case: str, size: int) -> Method:
    name, parameters = CASES[case]
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2}, SIDE)
    return METHODS[name](encoder, TrainingInfo(size, 5, 0, 10, torch.full((size,), -1)), **parameters)


def record_real_step(case: str) -> list[tuple[str, int]]:
    method = build_method(case, 4 * ROWS)
    with record_collectives(get_real_collectives()) as seen:
        run_step(method, make_worker_batch(ROWS, rank(), SIDE))
    return [(message.kind, message.payload) for message in seen]


@pytest.mark.parametrize("case", CASES)
def test_estimated_step_bytes_equal_those_of_two_workers(pool: Pool, case: str) -> None:
    estimated = [
        (message.kind, message.payload)
        for message in simulate_step(lambda size: build_method(case, size), 2, ROWS, SIDE)
    ]
    for measured in pool.run(record_real_step, case):
        assert [*measured, ("all_reduce", traffic.LOOP_BYTES)] == estimated


def count_real_gradient_bytes(case: str) -> tuple[int, int]:
    """Bytes of gradients in DistributedDataParallel's buckets, and of the buffers that it broadcasts."""
    method, reduced, copied = build_method(case, 4 * ROWS), [0], [0]

    def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced[0] += bucket.buffer().nbytes
        future = torch.futures.Future[torch.Tensor]()
        future.set_result(bucket.buffer())
        return future

    true = dist._broadcast_coalesced

    def coalesced(group: Any, tensors: list[torch.Tensor], *rest: Any) -> Any:
        copied[0] += sum(tensor.nbytes for tensor in tensors)
        return true(group, tensors, *rest)

    model = DistributedDataParallel(method)
    model.register_comm_hook(None, count)
    dist._broadcast_coalesced = coalesced
    try:
        model(make_worker_batch(ROWS, rank(), SIDE))["loss"].backward()
    finally:
        dist._broadcast_coalesced = true
    return reduced[0], copied[0]


@pytest.mark.parametrize("case", ["nat", "clustering_locality", "super_and"])
def test_gradient_and_buffer_bytes_equal_distributed_data_parallel(pool: Pool, case: str) -> None:
    estimated = {message.kind: message.payload for message in list_gradient_messages(build_method(case, 4 * ROWS))}
    for gradients, buffers in pool.run(count_real_gradient_bytes, case):
        assert (gradients, buffers) == (estimated["all_reduce"], estimated.get("broadcast", 0))


def record_real_discovery(size: int) -> list[tuple[str, int]]:
    with record_collectives(get_real_collectives()) as seen:
        MemoryBank(size, 12, 0, 8192).find_neighbours(0.1)
    return [(message.kind, message.payload) for message in seen]


def test_estimated_discovery_bytes_equal_those_of_two_workers(pool: Pool) -> None:
    blocks, each = traffic.simulate_discovery(12, 4096, 2)
    assert blocks == 4
    for measured in pool.run(record_real_discovery, 4096):
        assert measured == [(message.kind, message.payload) for message in each] * blocks


def count_acknowledged_bytes() -> int:
    """Bytes that this process's sockets have sent and others have confirmed (tcp_info.tcpi_bytes_acked)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    total += struct.unpack_from("Q", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 120)[0]
    return total


def count_collective_bytes(kind: str, numbers: int) -> int:
    tensor = torch.zeros(numbers)
    work = {
        "all_reduce": lambda: dist.all_reduce(tensor),
        "all_gather": lambda: dist.all_gather([torch.empty_like(tensor) for _ in range(world_size())], tensor),
        "broadcast": lambda: dist.broadcast(tensor, src=0),
    }[kind]
    dist.barrier()
    before = count_acknowledged_bytes()
    work()
    dist.barrier()
    return count_acknowledged_bytes() - before


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "broadcast"])
@pytest.mark.parametrize("workers", [2, 3])
def test_sent_bytes_equal_those_of_sockets(request: pytest.FixtureRequest, kind: Any, workers: int) -> None:
    """A broadcast is sent once by each but the last of a chain; by gloo's tree as often in all."""
    pool: Pool = request.getfixturevalue("pool" if workers == 2 else "pool3")
    message = CollectiveMessage(kind, 4_000_000)
    measured = sum(pool.run(count_collective_bytes, kind, message.payload // 4))
    estimated = (workers - 1 if kind == "broadcast" else workers) * message.count_sent_bytes(workers)
    assert measured == pytest.approx(estimated, rel=0.01)


def count_table_bytes(case: str, size: int) -> int:
    """Bytes of the storages that the tables of this worker keep."""
    return sum(
        part.untyped_storage().nbytes()
        for table in memory.find_tables(build_method(case, size)).values()
        for part in (table.values, table.own_rows)
    )


@pytest.mark.parametrize("case", ["nat", "nat, one_hot", "super_and", "instance", "dae"])
@pytest.mark.parametrize("size", [1_001, 100_000])
def test_estimated_table_bytes_equal_storages(pool: Pool, case: str, size: int) -> None:
    estimated = memory.measure_tables(build_method(case, 4))
    assert count_table_bytes(case, size) == sum(rows.count_bytes(size, 0, 1) for rows in estimated)
    assert pool.run(count_table_bytes, case, size) == [
        sum(rows.count_bytes(size, rank, 2) for rows in estimated) for rank in range(2)
    ]


def test_estimated_plan_bytes_equal_plan() -> None:
    order = orders.make_plan(1024, 4096, 131_072)
    assert memory.measure_plan_bytes(order) == memory.estimate_plan_bytes(131_072)
    assert _shuffle_epoch.cache_parameters()["maxsize"] == memory.CACHED_EPOCHS


@pytest.mark.parametrize("held_out", [False, True])
def test_estimated_bytes_of_lanes_equal_plan(held_out: bool) -> None:
    size = 131_072
    order = orders.make_lane_plan(1024, 4096, size)
    if held_out:
        # Every other image: the first and the last are trained on.
        ids = np.sort(np.append(np.arange(0, size, 2), size - 1))
        order = replace(order, id_set=make_id_set(ids))
    assert memory.measure_lane_plan_bytes(order) == memory.estimate_lane_plan_bytes(size, held_out)
    assert _order_groups.cache_parameters()["maxsize"] == memory.CACHED_GROUP_ORDERS


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_tasks_of_all_workers_form_batches_of_plan(workers: int) -> None:
    for order in (orders.make_plan(1024, 4096, 16_384), orders.make_lane_plan(1024, 4096, 16_384)):
        parts = [np.concatenate(orders.list_task_ids(order, rank, workers)) for rank in range(workers)]
        steps = np.concatenate([part.reshape(order.steps, -1) for part in parts], axis=1)
        assert np.array_equal(steps, order.epoch(0))


@pytest.mark.parametrize(("workers", "amplification"), [(16, 1.0), (64, 4.0), (128, 8.0)])
def test_workers_sharing_a_lane_read_all_of_it(workers: int, amplification: float) -> None:
    found = orders.measure_plan_reading(orders.make_plan(4096, 1_048_576), workers)
    assert found.lanes == 16
    assert found.amplification == pytest.approx(amplification, rel=0.1)
    assert found.share == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize("workers", [8, 64])
def test_workers_with_lanes_of_their_own_read_what_they_train_on(workers: int) -> None:
    found = orders.measure_plan_reading(orders.make_lane_plan(256 * workers, 32_768), workers)
    assert found.lanes == 4 * workers
    assert found.amplification < 1.15
    assert found.share == pytest.approx(1 / workers, rel=0.15)


def test_ring_bytes_and_tree_latency() -> None:
    assert [
        CollectiveMessage(kind, 1000).count_sent_bytes(4) for kind in ("all_reduce", "all_gather", "broadcast")
    ] == [1500, 3000, 1000]
    slow = NetworkSpeed("slow", 1000.0, 1.0)
    assert slow.estimate_seconds(
        [CollectiveMessage("all_reduce", 1000), CollectiveMessage("broadcast", 500)], 4
    ) == pytest.approx(1.5 + 4 + 0.5 + 2)
    assert slow.estimate_seconds([CollectiveMessage("all_reduce", 1000)], 1) == 0.0


def test_command_prints_all_tables() -> None:
    small = [
        "--images",
        "1e6",
        "--workers",
        "4",
        "--rows",
        "8",
        "--encoder",
        "convnet",
        "--image-size",
        "64",
        "--window",
        "256",
    ]
    answer = CliRunner().invoke(main, small)
    assert answer.exit_code == 0, answer.output
    rows = {
        tuple(cell.strip() for cell in line.split("│")[1:3]): line
        for line in answer.output.splitlines()
        if line.startswith("│")
    }
    assert "1,000,000 images of 64 x 64, 4 workers, convnet, batches of 32: 31,250 steps an epoch" in answer.output
    assert "130 MB" in rows["super_and", "bank"], "250,000 rows of 128 float32, and their ids"
    assert "8.19 kB" in rows["nat", "costs, in a step"], "32 x 32 float64"
    assert all(any(key[0] == case for key in rows) for case in METHOD_CASES)


def test_time_and_memory_of_a_plan_of_lanes_are_printed() -> None:
    answer = CliRunner().invoke(main, ["--plan-images", "100000"], catch_exceptions=False)
    assert "A plan of lanes over 100,000 images" in answer.output
    whole, thinned = (orders.time_lane_plan(100_000, held_out)["bytes"] for held_out in (False, True))
    assert whole == sum(memory.estimate_lane_plan_bytes(100_000, False).values())
    assert whole < thinned < 2 * whole
