"""Frozen features that stages share, against a pass over the images for each: `python -m bench.features_once`.

A recipe from given weights evaluates them, retrieves by them and embeds by them, beside random weights. It runs twice
in turns, each time in a process of its own: as always, and with a pass over the images for each stage.
"""

import contextlib
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

import click
from rich.console import Console
from rich.table import Table

from bench.own_process import run_in_own_process
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.features import kept_features

FEATURE_ARMS = SHARED, APART = "shared", "apart"
SCORED_STAGES = ("evaluate", "retrieve", "embed")


def make_features_recipe(root: Path, storage: Path, weights: Path, model: str, side: int) -> Recipe:
    """Returns the recipe: three stages on the images in `root`, a folder for each class, in views of `side` pixels."""
    return parse_recipe(
        {
            "name": "features",
            "storage": str(storage),
            "seeds": [0],
            "dataset": {
                "name": "photographs",
                "source": "folder",
                "root": str(root),
                "image_size": side,
                "test_fraction": 0.2,
                "train_augment": [{"op": "center_crop"}],
                "eval_augment": [{"op": "center_crop"}],
            },
            "encoder": {"name": "timm", "model": model, "weights": str(weights)},
            "scale": {"name": "local", "workers": 0, "gpus_per_worker": 0.0},
            "stages": {kind: {"kind": kind} for kind in SCORED_STAGES},
        }
    )


def run_features_recipe(arm: str, root: Path, storage: Path, weights: Path, model: str, side: int) -> dict[str, float]:
    """Runs the recipe in this process. Returns the seconds of the run, and the CPU seconds of the process."""
    recipe = make_features_recipe(root, storage, weights, model, side)
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if arm == APART:
            stack.enter_context(mock.patch.object(kept_features, "MAX_KEPT_BYTES", 0))
        run_recipe(recipe, Console(quiet=True))
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"wall_s": time.perf_counter() - begun, "cpu_s": used.ru_utime + used.ru_stime}


def measure_arms(root: Path, weights: Path, model: str, side: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Returns the seconds of each arm in each round. Every run writes its store, too."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in FEATURE_ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for arm, rows in found.items():
                storage = Path(folder) / f"{arm}{number}"
                rows.append(run_in_own_process(run_features_recipe, arm, root, storage, weights, model, side))
    return found


@click.command(help=__doc__)
@click.option(
    "--root", type=click.Path(exists=True, path_type=Path), required=True, help="Photographs, a folder for each class."
)
@click.option("--weights", type=click.Path(exists=True, path_type=Path), required=True, help="Weights of the model.")
@click.option("--model", default="tf_efficientnet_lite0", show_default=True, help="A model of timm.")
@click.option("--side", type=int, default=128, show_default=True)
@click.option("--rounds", type=int, default=2, show_default=True)
def main(root: Path, weights: Path, model: str, side: int, rounds: int) -> None:
    """Prints the seconds of the arms, and their ratio."""
    found = measure_arms(root, weights, model, side, rounds)
    table = Table("one recipe", "CPU seconds", "seconds")
    sums = {
        name: [sum(row[part] for row in rows) / rounds for part in ("cpu_s", "wall_s")] for name, rows in found.items()
    }
    for name, (cpu, wall) in sums.items():
        table.add_row(name, f"{cpu:.1f}", f"{wall:.1f}")
    table.add_row("shared / apart", *(f"{a / b:.2f}" for a, b in zip(sums[SHARED], sums[APART], strict=True)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
