"""A recipe whose method, task, encoder and source come from another installed package, by the command line."""

import json
from pathlib import Path

from firstlight.pipeline.data.store import Store
from tests.support import command
from tests.support.extension_package import MODULE, write_package
from tests.support.folders_of_noise import write_noise_folder

TRAINING = {"epochs": 1, "batch_size": 4, "optimizer": {"name": "SGD", "lr": 0.01}}


def run_command(folder: Path, *words: str) -> tuple[int, str]:
    """Returns the exit code of a command, and what it prints."""
    variables = {"XDG_CACHE_HOME": str(folder / "cache")}
    return command.start(folder / "out.txt", *words, environment=variables, site=folder / "site").wait()


def test_recipe_of_an_extension_runs_and_follows_its_code(tmp_path: Path) -> None:
    write_package(tmp_path / "site")
    write_noise_folder(tmp_path / "images", {"a": 12, "b": 12}, (16, 16))
    recipe = {
        "name": "loud",
        "storage": str(tmp_path / "runs"),
        "dataset": {
            "name": "loud",
            "source": "loud",
            "root": str(tmp_path / "images"),
            "image_size": 16,
            "train_augment": [{"op": "random_shift", "padding": 1}],
            "eval_augment": [{"op": "center_crop"}],
        },
        "encoder": {"name": "two_layers", "width": 6},
        "scale": {"name": "local", "workers": 0},
        "stages": {
            "pretrain": {"method": {"name": "squeezed", "factor": 3.0}, **TRAINING},
            "finetune": {"task": {"name": "named"}, "labels_per_class": 3, "learning_rates": [], **TRAINING},
        },
    }
    (tmp_path / "loud.yaml").write_text(json.dumps(recipe))
    file = str(tmp_path / "loud.yaml")
    code, printed = run_command(tmp_path, "config", file, "stages.pretrain.method.factor=-1")
    assert (code, printed.count("\n")) == (2, 1), printed
    assert printed.startswith("error: stages.pretrain.method.factor: ")
    code, printed = run_command(tmp_path, "run", file)
    assert code == 0, printed
    (store,) = (tmp_path / "runs" / "stores").iterdir()
    assert Store.open(store).classes == ("A", "B")
    assert "named, 6 labels" in printed
    _, printed = run_command(tmp_path, "run", file)
    assert "pretrain seed 0: finished before" in printed
    (tmp_path / "site" / "loud_extension" / "parts.py").write_text(MODULE + "\nCHANGED = True\n")
    _, printed = run_command(tmp_path, "run", file)
    assert "pretrain: started" in printed
