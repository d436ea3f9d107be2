"""Kills machines, drivers and workers at random on a Ray cluster.

Usage: `python -m tests.scripts.chaos_cluster [--machines 3] [--kills 3] [method ...]`.

The cluster consists of raylets on this machine: a head that has no CPU, and machines of two. For every method a recipe
(its pretraining on two workers; for nat also kNN and probe, a fine-tuning and the embeddings) is run to its end twice:
without and with kills. A machine that is killed is replaced by another, a worker by Ray; a driver is run again. Files
and MLflow must be the same to the last bit at the end.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), RAY_USAGE_STATS_ENABLED="0"
)  # before Ray is imported

import psutil

from firstlight.pipeline.config.recipe import Recipe
from tests.scripts.chaos import differences, left_by
from tests.support import recipes

METHODS: dict[str, dict[str, Any]] = {
    "nat": {"method": recipes.RECIPE["stages"]["pretrain"]["method"]},
    "spatial_contrasting": {"method": {"name": "spatial_contrasting", "patch_size": 2}},
    "dae": {"method": {"name": "dae"}, "optimizer": {"name": "Adam", "lr": 0.003}},
    "instance": {
        "method": {"name": "super_and", "dim": 8, "rounds": 1, "neighbours": False, "ue": False, "aug": False}
    },
    "super_and": {"method": {"name": "super_and", "dim": 8, "rounds": 2, "ue_period": 1, "chunk": 40}},
    "clustering_locality": {"method": {"name": "clustering_locality"}, "labels_per_class": 4, "labelled_per_batch": 10},
}
WHOLE = "nat"  # the method whose recipe has more stages than the pretraining
EPOCHS = 24  # 72 steps and as many checkpoints: seconds, into which the kills fall
MACHINE: dict[str, Any] = {
    "num_cpus": 2,
    "object_store_memory": 100 * 2**20,
}  # a worker of 1.5 CPUs leaves half a one for decoding
SCALE: dict[str, Any] = {
    "workers": 2,
    "cpus_per_worker": 1.5,
    "collective_timeout_s": 40,
    "max_failures": 100,
    "wait_s": 60,
}
VICTIMS = ("driver", "worker", "machine")


def recipe(storage: Path, address: str, method: str, whole: bool) -> Recipe:
    """`whole`: with the stages behind the pretraining."""
    pretrain = {**recipes.RECIPE["stages"]["pretrain"], **METHODS[method], "epochs": EPOCHS, "register_as": "chaos"}
    stages = (
        {**recipes.RECIPE["stages"], "pretrain": pretrain, "embed": {"kind": "embed", "batch_size": 32}}
        if whole
        else {"pretrain": pretrain}
    )
    return recipes.recipe(
        storage,
        name=method,
        stages=stages,
        scale__address=address,
        **{f"scale__{key}": value for key, value in SCALE.items()},
    )


class Machines:
    """The cluster. One of its machines can be lost; another takes its place."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
        self.nodes = [self.cluster.add_node(**MACHINE) for _ in range(count)]

    def lose(self, rng: random.Random) -> None:
        place = rng.randrange(len(self.nodes))
        self.cluster.remove_node(self.nodes[place], allow_graceful=False)
        self.nodes[place] = self.cluster.add_node(**MACHINE)

    def workers(self) -> list[psutil.Process]:
        """Returns the processes that train."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in process.cmdline()[0]:
                    found.append(process)
        return found


def start(file: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    with open(log, "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "firstlight.pipeline", "run", str(file)], stdout=out, stderr=out, env=environment
        )


def rows(storage: Path) -> int:
    """Lines that trainings have logged so far."""
    return sum(file.read_bytes().count(b"\n") for file in storage.rglob("metrics.jsonl"))


def victims(kills: int, rng: random.Random) -> list[str]:
    """Each kind as often as the others, in a random order."""
    drawn = [VICTIMS[k % len(VICTIMS)] for k in range(kills)]
    rng.shuffle(drawn)
    return drawn


def bring_to_its_end(machines: Machines, wanted: Recipe, kills: int, rng: random.Random) -> Iterator[str]:
    """Run a recipe until it has ended, killing on the way; tells each kill.

    Raises:
        RuntimeError: it failed by itself; with the end of what it said.
    """
    storage = wanted.storage
    storage.mkdir()
    file, log = storage / "recipe.json", storage / "log.txt"
    file.write_text(json.dumps(wanted.dump()))
    process = start(file, log)
    for victim in victims(kills, rng):
        seen = rows(storage)
        while process.poll() is None and rows(storage) == seen:  # into the work, not into a start
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.0, 3.0))
        if process.poll() is not None:
            break
        training = machines.workers()
        if victim == "worker" and training:
            rng.choice(training).kill()
        elif victim == "machine":
            machines.lose(rng)
        else:
            victim = "driver"
            process.kill()
            process.wait()
            process = start(file, log)
        yield f"{victim} killed after {rows(storage)} rows"
    if process.wait():
        raise RuntimeError(f"{wanted.name}: {log.read_text()[-3000:]}")


def main(methods: list[str], machines: int, kills: int, seed: int) -> int:
    """Returns the number of methods that ended otherwise than those that were left alone."""
    rng, bad, made = random.Random(seed), 0, 0
    here = Machines(machines)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for method in methods:
                left = []
                for name, count in (("alone", 0), ("killed", kills)):
                    began, storage = time.monotonic(), Path(folder) / f"{method}-{name}"
                    wanted = recipe(storage, here.cluster.address, method, whole=method == WHOLE)
                    for told in bring_to_its_end(here, wanted, count, rng):
                        made += 1
                        print(f"  {method}: {told}", flush=True)
                    left.append(left_by(wanted))
                    print(f"  {method}: {name}, at its end after {time.monotonic() - began:.0f} s", flush=True)
                wrong = differences(*left)
                bad += bool(wrong)
                print(
                    f"{method}: {len(left[0])} things compared, "
                    f"{'as if left alone' if not wrong else f'DIFFERS: {wrong}'}",
                    flush=True,
                )
    finally:
        here.cluster.shutdown()
    print(f"{machines} machines, {made} kills, {len(methods)} methods, {bad} of them otherwise than when left alone")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="method", help=f"of {', '.join(METHODS)}; all, if none is given")
    parser.add_argument("--machines", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3, help="for each method")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := [name for name in given.methods if name not in METHODS]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(METHODS)}")
    sys.exit(min(main(given.methods or list(METHODS), given.machines, given.kills, given.seed), 1))
