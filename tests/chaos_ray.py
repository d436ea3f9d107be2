"""SIGKILL at random moments of a run on Ray: `python -m tests.chaos_ray [kills] [seed]`. A line for each kill.

The recipe of `tests.chaos` on two workers. Each time the driver is killed and run again, or one of the training workers, which Ray starts anew; what
is left at the end must be what a run leaves that was never killed.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import chaos_recipe, differences, left_by

KILLS = 8
ON_RAY = (
    "scale.workers=2",
    "scale.cpus=4",
    "scale.cpus_per_worker=1",
    "scale.max_failures=100",
    "stages.neighbours.epochs=12",
    "stages.pretrain.epochs=12",
)
WORKER = "RayTrainWorker"


def start(recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "pipeline", "run", str(recipe), *ON_RAY]
    with open(log, "ab") as file:
        return subprocess.Popen(program, stdout=file, stderr=file, env={**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"})


def workers(driver: int) -> list[psutil.Process]:
    """The training workers of a run that train already."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if any(WORKER in word for word in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps(storage: Path) -> int:
    """Lines that trainings have logged so far."""
    return sum(file.read_bytes().count(b"\n") for file in storage.rglob("metrics.jsonl"))


def one(storage: Path, kills: int, rng: random.Random) -> int:
    """Run the recipe to its end, killing; how often it was killed."""
    recipe = storage / "recipe.yaml"
    recipe.write_text(json.dumps(chaos_recipe(storage).dump()))
    made, process = 0, start(recipe, storage / "log.txt")
    while True:
        wait_for, seen = rng.uniform(0.0, 4.0), steps(storage)
        while process.poll() is None and (steps(storage) == seen or not workers(process.pid)):  # into the work, not into Ray's start
            time.sleep(0.1)
        end = time.monotonic() + wait_for
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if process.poll() is not None:
            if process.returncode:
                raise RuntimeError((storage / "log.txt").read_text()[-3000:])
            return made
        if made == kills:
            process.wait()
            continue
        alive = workers(process.pid)
        victim = rng.choice(alive) if alive and rng.random() < 0.5 else None
        (victim or process).kill()
        made += 1
        print(f"{made:4} kills: {'a worker' if victim else 'the driver'}, after {steps(storage)} rows", flush=True)
        if victim is None:
            process.wait()
            process = start(recipe, storage / "log.txt")


def main(kills: int = KILLS, seed: int = 0) -> int:
    """1 where the run ended otherwise than the one that was never killed."""
    with tempfile.TemporaryDirectory() as folder:
        left: list[dict[str, Any]] = []
        for name, count in (("clean", 0), ("killed", kills)):
            storage = Path(folder) / name
            storage.mkdir()
            made = one(storage, count, random.Random(seed))
            left.append(left_by(storage))
            print(f"{name}: brought to its end after {made} kills, {len(left[-1])} things to compare", flush=True)
    wrong = differences(*left)
    print(f"{made} kills on Ray: {'as if never killed' if not wrong else f'DIFFERS: {wrong}'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
