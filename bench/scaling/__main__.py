"""`python -m bench.scaling --images 1e9 --workers 512`: the tables of docs/scaling.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.scaling import memory, orders
from bench.scaling.cost import (
    COST_ENTRY_BYTES,
    NETWORKS,
    NetworkSpeed,
    WorkerSpeed,
    count_bank_flops,
    count_discovery_flops,
    estimate_assignment_seconds,
)
from bench.scaling.traffic import CollectiveMessage, list_gradient_messages, simulate_discovery, simulate_step
from firstlight.pipeline.data.manifest import ROWS_PER_GROUP
from firstlight.pipeline.data.order.lane_plan import LanePlan
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.row_groups import IMAGE_CACHE_BYTES
from firstlight.tasks.memory_bank import MemoryBank
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.pretrain.method import Method, TrainingInfo

# Name -> a method, and the parameters that differ from its defaults
METHOD_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nat": ("nat", {"pool": "avg"}),
    "nat, assign: local": ("nat", {"pool": "avg", "assign": "local"}),
    "spatial_contrasting": ("spatial_contrasting", {}),
    "spatial_contrasting, patch_features: avg": ("spatial_contrasting", {"patch_features": "avg"}),
    "clustering_locality": ("clustering_locality", {}),
    "dae": ("dae", {}),
    "super_and": ("super_and", {}),
    "super_and, variant: reference": ("super_and", {"variant": "reference"}),
}
SCALING_CLASSES, SCALING_EPOCHS = 1000, 200


@dataclass(frozen=True)
class TrainingScale:
    """The size of a training. `rows` is the number of images of a worker in a step."""

    images: int
    workers: int
    rows: int

    @property
    def batch(self) -> int:
        return self.workers * self.rows

    @property
    def steps(self) -> int:
        return self.images // self.batch

    @property
    def shard(self) -> int:
        """Rows of a table on the worker with the most rows."""
        return -(-self.images // self.workers)


def make_builder(case: str, encoder: Encoder) -> Callable[[int], Method]:
    """Returns a function that builds the method for a number of images, around one shared network."""
    name, changes = METHOD_CASES[case]
    parameters = METHODS[name].complete_parameters(changes)
    return lambda size: METHODS[name](
        encoder, TrainingInfo(size, SCALING_EPOCHS * parameters.get("rounds", 1), 0, SCALING_CLASSES), **parameters
    )


@dataclass(frozen=True)
class MethodReport:
    """A method and what it exchanges in a step: for its loss, and for the gradients."""

    case: str
    method: Method
    exchanges: list[CollectiveMessage]
    gradients: list[CollectiveMessage]

    @property
    def bank_dim(self) -> int | None:
        """Dimension of the memory bank; None if the method has none."""
        found = [table.values.shape[1] for table in self.method.tables.values() if isinstance(table, MemoryBank)]
        return found[0] if found else None

    def count_solved_images(self, scale: TrainingScale) -> int:
        """Returns the number of images whose targets one worker exchanges in a step; 0 if none are."""
        assign = getattr(self.method, "assign", None)
        return {"global": scale.batch, "local": scale.rows}.get(str(assign), 0)

    def estimate_step_parts(
        self, scale: TrainingScale, machine: WorkerSpeed, network: NetworkSpeed
    ) -> dict[str, float]:
        """Returns the seconds of each part of a step."""
        bank = (
            count_bank_flops(scale.batch * self._count_bank_queries(), scale.shard, self.bank_dim) / machine.flops
            if self.bank_dim
            else 0.0
        )
        return {
            "networks": scale.rows / machine.images_per_s,
            "gradients": network.estimate_seconds(self.gradients, scale.workers),
            "exchanges": network.estimate_seconds(self.exchanges, scale.workers),
            "assignment": estimate_assignment_seconds(self.count_solved_images(scale)),
            "bank": bank,
        }

    def _count_bank_queries(self) -> int:
        """Returns the queries of the bank for each image."""
        return 2 if getattr(self.method, "variant", "") == "reference" else 1


def analyse_method(case: str, encoder: Encoder, scale: TrainingScale) -> MethodReport:
    """Simulates a step of the method on one of `scale.workers` workers."""
    build = make_builder(case, encoder)
    encoder.requires_grad_(True)
    exchanges = simulate_step(build, scale.workers, scale.rows, encoder.image_size) if scale.workers > 1 else []
    encoder.requires_grad_(True)
    method = build(scale.workers)
    return MethodReport(case, method, exchanges, list_gradient_messages(method))


def format_bytes(count: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def make_results_table(title: str, *headings: str) -> Table:
    out = Table(title=title, title_justify="left")
    for k, heading in enumerate(headings):
        out.add_column(heading, justify="left" if k == 0 else "right")
    return out


def make_traffic_table(reports: list[MethodReport], scale: TrainingScale) -> Table:
    """Returns the table of bytes that a worker sends in a step."""
    title = f"Bytes that a worker sends in a step of {scale.batch:,} images ({scale.rows} a worker)"
    out = make_results_table(
        title, "method", "gradients", "exchanges of the loss", "collectives", "largest result of one"
    )
    for report in reports:
        gradients, exchanges = (
            sum(m.count_sent_bytes(scale.workers) for m in messages)
            for messages in (report.gradients, report.exchanges)
        )
        largest = max((m.count_result_bytes(scale.workers) for m in report.exchanges), default=0)
        out.add_row(
            report.case,
            format_bytes(gradients),
            format_bytes(exchanges),
            f"{len(report.exchanges) + len(report.gradients)}",
            format_bytes(largest),
        )
    return out


def make_memory_table(reports: list[MethodReport], scale: TrainingScale) -> Table:
    out = make_results_table("Memory of the tables", "method", "table", "a row", "of all", "on a worker")
    for report in reports:
        for rows in memory.measure_tables(report.method):
            whole = sum(rows.count_bytes(scale.images, rank, scale.workers) for rank in range(scale.workers))
            out.add_row(
                report.case,
                rows.name,
                format_bytes(rows.row_bytes + rows.id_bytes),
                format_bytes(whole),
                format_bytes(rows.count_bytes(scale.images, 0, scale.workers)),
            )
        if solved := report.count_solved_images(scale):
            out.add_row(report.case, "costs, in a step", "", "", format_bytes(COST_ENTRY_BYTES * solved**2))
    return out


def make_plan_tables(
    scale: TrainingScale, windows: tuple[int, ...], image_bytes: float, machine: WorkerSpeed
) -> list[Table]:
    """Returns the tables of the memory of the order, and of what a worker reads."""
    held = {
        "windowed": memory.estimate_plan_bytes(scale.images),
        "lanes": memory.estimate_lane_plan_bytes(scale.images, False),
        "lanes, images held out": memory.estimate_lane_plan_bytes(scale.images, True),
    }
    out = make_results_table(
        "The order of all images, in every process that trains or decodes",
        *("stream.shuffle", "ids", "row groups", "kept epochs", "all"),
    )
    for name, parts in held.items():
        out.add_row(name, *(format_bytes(count) for count in parts.values()), format_bytes(sum(parts.values())))
    of_images = f"(images of {format_bytes(image_bytes)})"
    read = make_results_table(
        f"What a worker reads, from {orders.NUM_BATCHES} batches of the same plan {of_images}",
        "stream.shuffle, window",
        "lanes",
        "images a task",
        "row groups a task",
        "read / used",
        "of all row groups",
        "a step",
        "an order",
    )
    for window in windows:
        # A training limits its window in the same way
        used = min(window, int(IMAGE_CACHE_BYTES // image_bytes))
        plans: dict[str, BatchPlan | LanePlan] = {
            "windowed": orders.make_plan(scale.batch, used),
            "lanes": orders.make_lane_plan(scale.batch, used),
        }
        for name, plan in plans.items():
            found = orders.measure_plan_reading(plan, scale.workers)
            seconds = scale.rows * found.amplification * image_bytes / machine.read_bytes_per_s
            of_task = (f"{found.used:,.0f}", f"{found.groups:,.0f}", f"{found.amplification:.1f}", f"{found.share:.1%}")
            read.add_row(
                f"{name}, {window:,} ({used:,} used)",
                f"{found.lanes}",
                *of_task,
                format_seconds(seconds),
                # Each worker draws its own lanes, so that their time is divided by the number of workers.
                format_seconds(found.seconds * scale.images / (scale.workers if name == "lanes" else 1)),
            )
    return [out, read]


def make_time_table(reports: list[MethodReport], scale: TrainingScale, machine: WorkerSpeed) -> Table:
    out = make_results_table(
        "Seconds of a step, one after the other",
        "method",
        "network",
        "networks",
        "gradients",
        "exchanges",
        "assignment",
        "bank",
        "most",
    )
    for report in reports:
        for network in NETWORKS:
            parts = report.estimate_step_parts(scale, machine, network)
            most = max(parts, key=lambda name: parts[name])
            out.add_row(
                report.case,
                network.name,
                *(format_seconds(seconds) if seconds else "" for seconds in parts.values()),
                most,
            )
    return out


def make_rounds_table(reports: list[MethodReport], scale: TrainingScale, machine: WorkerSpeed) -> Table:
    out = make_results_table(
        "Neighbours of all images, once a round",
        "method",
        "blocks",
        "a worker sends",
        *(n.name for n in NETWORKS),
        "products",
    )
    for report in reports:
        if report.bank_dim and "neighbour" in report.method.tables:
            blocks, each = simulate_discovery(report.bank_dim, scale.images, scale.workers)
            sent = blocks * sum(m.count_sent_bytes(scale.workers) for m in each)
            waits = [format_seconds(blocks * network.estimate_seconds(each, scale.workers)) for network in NETWORKS]
            products = count_discovery_flops(scale.images, scale.shard, report.bank_dim) / machine.flops
            out.add_row(report.case, f"{blocks:,}", format_bytes(sent), *waits, format_seconds(products))
    return out


def make_lane_plan_table(images: int) -> Table:
    """Returns the table of what a plan of lanes over `images` images takes in this process."""
    out = make_results_table(
        f"A plan of lanes over {images:,} images, CPU time of one process",
        *("images", "start", "first batch", "next epoch", "next window", "memory"),
    )
    for name, held_out in (("all", False), ("99 of 100", True)):
        found = orders.time_lane_plan(images, held_out)
        taken = found.pop("bytes")
        out.add_row(name, *map(format_seconds, found.values()), format_bytes(taken))
    return out


@click.command(help=__doc__)
@click.option("--images", type=float, default=1e9, show_default=True)
@click.option("--workers", type=click.IntRange(min=2), default=512, show_default=True)
@click.option(
    "--rows", type=click.IntRange(min=1), default=256, show_default=True, help="Images of a worker in a step."
)
@click.option("--encoder", default="resnet50", show_default=True, help="The name of the encoder, as in a recipe.")
@click.option("--image-size", type=int, default=224, show_default=True)
@click.option("--image-bytes", type=float, default=100e3, show_default=True, help="Bytes of an encoded image.")
@click.option(
    "--speed",
    type=float,
    default=2500.0,
    show_default=True,
    help="Images per second of the networks of a worker, without communication and reading.",
)
@click.option(
    "--flops",
    type=float,
    default=30e12,
    show_default=True,
    help="Operations per second of a worker in matrix products of float32.",
)
@click.option(
    "--read", type=float, default=1e9, show_default=True, help="Bytes per second that a worker gets from storage."
)
@click.option("--window", type=int, multiple=True, default=(2048,), show_default=True)
@click.option("--plan-images", type=float, default=0.0, help="Time a plan of lanes over so many images, and end.")
def main(
    encoder: str,
    image_size: int,
    image_bytes: float,
    speed: float,
    flops: float,
    read: float,
    window: tuple[int, ...],
    plan_images: float,
    **counts: float,
) -> None:
    """Prints what a training of the given size moves, holds and waits for, as tables."""
    if plan_images:
        Console(width=150).print(make_lane_plan_table(int(plan_images)))
        return
    torch.manual_seed(0)
    scale = TrainingScale(int(counts["images"]), int(counts["workers"]), int(counts["rows"]))
    machine = WorkerSpeed(speed, flops, read)
    network = Encoder({"name": encoder}, image_size)
    reports = [analyse_method(case, network, scale) for case in METHOD_CASES]
    console = Console(width=150)
    title = f"{scale.images:,} images of {image_size} x {image_size}, {scale.workers} workers, {encoder}"
    steps = f"batches of {scale.batch:,}: {scale.steps:,} steps an epoch"
    console.print(f"{title}, {steps}. Row groups of {ROWS_PER_GROUP} images.")
    console.print(
        make_traffic_table(reports, scale),
        make_memory_table(reports, scale),
        *make_plan_tables(scale, window, image_bytes, machine),
    )
    console.print(make_time_table(reports, scale, machine), make_rounds_table(reports, scale, machine))


if __name__ == "__main__":
    main()
