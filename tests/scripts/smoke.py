"""Runs the trials of all recipes, or of those named: `python -m tests.scripts.smoke [nat/table3 ...]`.

The data are tiny sets in the published layouts. Prints a line for each recipe.

A recipe whose encoder comes from others is run after them, in the same storage.
"""

import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import WEIGHT_KEYS
from firstlight.pipeline.errors import StageFailed, StopTraining, UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.tasks.nn.encoders import Encoder
from tests.support.layouts import LAYOUTS

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def data(name: str, folder: Path) -> tuple[str, ...]:
    """Returns the overrides that point a recipe to its data, which are written the first time."""
    dataset = yaml_reader.read_yaml(RECIPES_FOLDER / f"{name}.yaml")["dataset"]
    kind = dataset if isinstance(dataset, str) else dataset["name"]
    if kind in ("digits", "mnist_5k"):
        return ()
    layout = {"list": "imagenet_devkit", "folder": "imagenet_devkit"}.get(kind, kind)
    root = folder / layout
    if not root.exists():
        root.mkdir(parents=True)
        LAYOUTS[layout](root)
    if kind != "list":
        return (f"dataset.root={root / 'train' if kind == 'folder' else root}",)
    paths = sorted(path.relative_to(root).as_posix() for path in (root / "train").rglob("*.JPEG"))
    (root / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in paths))
    return (f"dataset.root={root}", f"dataset.list={root / 'list.csv'}")


def write_random_weights(spec: Mapping[str, Any], image_size: int, file: Path) -> Path:
    """Writes random weights of a network, in place of those that a recipe would download."""
    torch.manual_seed(0)
    encoder = Encoder(spec, image_size)
    save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, file)
    return file


def list_named_weights(recipe: Recipe, folder: Path) -> list[str]:
    """Writes random weights for each network of a recipe that names some. Returns the overrides that point to them."""
    size, found = recipe.dataset.image_size, []
    if recipe.takes_given:
        file = write_random_weights(recipe.network_spec, size, folder / f"{recipe.name}.safetensors")
        found.append(f"encoder.weights={file}")
    for name, stage in recipe.stages.items():
        if isinstance(stage, Pretrain) and stage.teacher is not None:
            spec = stage.teacher.model_dump(mode="json", exclude=set(WEIGHT_KEYS))
            place = folder / f"{recipe.name}-{name}.safetensors"
            file = write_random_weights(spec, stage.choose_teacher_size(size), place)
            found.append(f"stages.{name}.method.teacher.weights={file}")
    return found


def trial(name: str, folder: Path) -> int:
    """Runs a recipe's trial in this process. Returns the number of rows of its table.

    Raises:
        UserError, StopTraining, StageFailed: as `firstlight.pipeline.run.runner.run_recipe`.
    """
    overrides = (*data(name, folder / "data"), f"storage={folder / 'runs'}")
    recipe = load_recipe(RECIPES_FOLDER / f"{name}.yaml", overrides, smoke=True)
    given = list_named_weights(recipe, folder / "data")
    if given:
        recipe = load_recipe(RECIPES_FOLDER / f"{name}.yaml", (*overrides, *given), smoke=True)
    return len(run_recipe(recipe, Console(file=io.StringIO())).rows)


def in_order(names: Sequence[str]) -> list[str]:
    """Returns the names and those of the recipes that they need, these first."""
    needs = {recipe.name: recipe.needs.after if recipe.needs else () for recipe in list_recipes()}
    out: list[str] = []

    def take(name: str) -> None:
        for before in needs[name]:
            take(before)
        if name not in out:
            out.append(name)

    for name in names:
        take(name)
    return out


def main(names: Sequence[str]) -> int:
    """Returns how many have failed."""
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in in_order(names or [recipe.name for recipe in list_recipes()]):
            start, used, told = time.monotonic(), time.process_time(), "ok    "
            try:
                trial(name, Path(folder))
            except Exception as error:  # one that breaks must not hide the others
                if not isinstance(error, UserError | StopTraining | StageFailed):
                    traceback.print_exc()
                failed, told, name = failed + 1, "failed", f"{name}: {' '.join(str(error).splitlines())[:300]}"
            print(
                f"{told}  {time.monotonic() - start:6.1f} s, {time.process_time() - used:6.1f} s of a CPU  {name}",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
