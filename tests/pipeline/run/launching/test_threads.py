"""The torch threads of a stage follow from the recipe and the machine, and never from what is left to do."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run.launch import launch_instances
from firstlight.pipeline.run.launching import threads
from firstlight.pipeline.run.launching.threads import choose_threads, count_cores
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.shared_work import hash_weights
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.attempts import ATTEMPTS_FILE
from tests.support import recipes


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_usable_cpus", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)


@pytest.mark.parametrize(
    ("seeds", "rates", "scale", "pretrain", "finetune"),
    [
        ([0], [], {}, 8, 4),
        ([0], [0.1, 0.3], {}, 8, 2),
        ([0, 1, 2], [], {}, 2, 1),
        (list(range(9)), [], {}, 1, 1),
        # Results are equal for all numbers of processes, so these decide nothing.
        ([0, 1, 2], [], {"processes": 1}, 2, 1),
        ([0], [], {"cpus": 4}, 4, 2),
        ([0, 1, 2], [], {"threads": 5}, 5, 5),
        ([0], [], {"workers": 2}, 1, 1),
        ([0], [], {"workers": 2, "cpus_per_worker": 3.5}, 3, 3),
        ([0], [], {"gpus_per_worker": 1.0, "cpus_per_worker": 4}, 4, 4),
    ],
)
def test_cores_are_divided_by_what_a_stage_has_to_do_side_by_side(
    tmp_path: Path, seeds: list[int], rates: list[float], scale: dict[str, Any], pretrain: int, finetune: int
) -> None:
    """A fine-tuning has two arms, the pretrained and the scratch one."""
    changes = {f"scale__{key}": value for key, value in {"threads": "auto", **scale}.items()}
    recipe = recipes.recipe(tmp_path, seeds=seeds, stages__finetune__learning_rates=rates, **changes)
    assert choose_threads(recipe, "pretrain") == pretrain
    assert choose_threads(recipe, "finetune") == finetune


@pytest.mark.parametrize(
    ("usable", "cores", "asked", "found"),
    [(16, 8, None, 8), (4, 8, None, 4), (16, 8, 4, 4), (16, None, None, 16), (1, 0, None, 1)],
)
def test_core_counts_once(
    monkeypatch: pytest.MonkeyPatch, usable: int, cores: int | None, asked: int | None, found: int
) -> None:
    """A container may have fewer CPUs than its machine has cores, and a machine may not tell its cores."""
    monkeypatch.setattr(threads, "count_usable_cpus", lambda: usable)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: cores)
    assert count_cores(asked) == found


def train_with_two_threads(recipe: Recipe, store: Store, folder: Path) -> StageInstance:
    instance = StageInstance("pretrain", 0, "0" * 12, folder)
    instance.folder.mkdir()
    launch_instances(recipe, store, [instance])
    assert torch.get_num_threads() == 2
    return instance


def test_stage_runs_with_its_threads_and_twice_to_the_same_bits(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[0], scale__threads="auto", scale__cpus=2)
    first, second = (train_with_two_threads(recipe, digits, tmp_path / name) for name in ("first", "second"))
    attempt = json.loads((first.folder / ATTEMPTS_FILE).read_text().splitlines()[0])
    assert attempt["machine"]["threads"] == 2
    one, other = (hash_weights(load_encoder(instance.folder / "encoder", 8)) for instance in (first, second))
    assert one == other
