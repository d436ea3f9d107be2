"""What `auto` becomes on machines with and without GPUs, and that a run says so."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import auto_scale
from firstlight.pipeline.run.auto_scale import FoundGpus, choose_scale, resolve_scale
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.run.runner import run_recipe
from tests.support import recipes


def scale_of(**keys: Any) -> ScaleOptions:
    return ScaleOptions.model_validate({"name": "local", **keys})


@pytest.mark.parametrize(
    ("keys", "gpus", "workers", "share"),
    [
        ({}, 0, 1, 0.0),
        ({}, 1, 1, 1.0),
        ({}, 8, 8, 1.0),
        ({"gpus_per_worker": 0.5}, 2, 4, 0.5),
        ({"gpus_per_worker": 2.0}, 8, 4, 2.0),
        ({"gpus_per_worker": 0.0}, 8, 1, 0.0),
        ({"workers": 0}, 0, 0, 0.0),
        ({"workers": 0}, 1, 0, 1.0),
        ({"workers": 2}, 1, 2, 0.0),
        ({"workers": 2}, 4, 2, 1.0),
        ({"workers": [2, 4]}, 2, (2, 4), 1.0),
        ({"workers": 3, "gpus_per_worker": 1.0}, 0, 3, 1.0),
    ],
)
def test_workers_and_gpus_follow_the_machine(keys: dict[str, Any], gpus: int, workers: Any, share: float) -> None:
    found = choose_scale(scale_of(**keys), gpus)
    assert (found.workers, found.gpus_per_worker) == (workers, share)
    assert found.is_resolved


def automatic(folder: Path, precision: str = "auto", **scale: Any) -> Recipe:
    changes = {f"scale__{key}": value for key, value in {"workers": "auto", "gpus_per_worker": "auto", **scale}.items()}
    return recipes.recipe(folder, stages__pretrain__precision=precision, **changes)


@pytest.mark.parametrize(
    ("gpus", "bf16", "line", "precision"),
    [
        (FoundGpus(0), False, "chosen: 1 worker on the CPUs, precision fp32", "fp32"),
        (FoundGpus(1, "H100"), True, "chosen: 1 worker on 1 GPU (H100), precision bf16", "bf16"),
        (FoundGpus(4, "V100"), False, "chosen: 4 workers on 4 GPUs (V100), precision fp16", "fp16"),
    ],
)
def test_choice_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: FoundGpus, bf16: bool, line: str, precision: str
) -> None:
    monkeypatch.setattr(auto_scale, "find_local_gpus", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    recipe, told = resolve_scale(automatic(tmp_path))
    assert told == line
    stage: Any = recipe.stages["pretrain"]
    assert stage.precision == precision
    assert recipe.scale.max_workers == max(gpus.count, 1)
    assert resolve_scale(recipe) == (recipe, None)


def test_cpus_beside_idle_gpus_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_scale, "find_local_gpus", lambda: FoundGpus(1, "H100"))
    _, told = resolve_scale(automatic(tmp_path, "fp32", workers=2))
    assert told == "chosen: 2 workers on the CPUs, though there are 1 GPU"


def test_cluster_is_asked_for_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self, scale: ScaleOptions) -> None:
            assert scale.max_workers == 0

        def __enter__(self) -> "Session":
            return self

        def __exit__(self, *_: object) -> None:
            ended.append(True)

        def start(self, always: bool) -> None:
            assert always

    ended: list[bool] = []
    monkeypatch.setattr(auto_scale, "RaySession", Session)
    monkeypatch.setattr(auto_scale, "list_live_nodes", lambda: [Node(8, 2), Node(8, 1), Node(8, 0)])
    recipe, told = resolve_scale(automatic(tmp_path, address="10.0.0.1:6379"))
    assert told == "chosen: 3 workers on 3 GPUs"
    stage: Any = recipe.stages["pretrain"]
    assert stage.precision == "auto", "it is chosen on the workers, which see their GPUs"
    assert ended


def test_run_prints_what_was_chosen_and_records_it(tmp_path: Path) -> None:
    out = io.StringIO()
    recipe = automatic(tmp_path, workers=0)
    run = run_recipe(recipe, Console(file=out, width=100), "prepare")
    assert "chosen: this process on the CPUs, precision fp32" in out.getvalue()
    assert run.rows == []


@pytest.mark.parametrize("key", ["workers", "gpus_per_worker"])
@pytest.mark.parametrize("value", [-1, "two", True, None, float("nan")])
def test_wrong_scale_is_refused_with_the_valid_values(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"scale\.{key}: .*or auto"):
        automatic(tmp_path, **{key: value})
