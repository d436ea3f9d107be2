"""The values of `auto` on machines with and without GPUs, and the message of a run about them."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import auto_scale, memory
from firstlight.pipeline.run.auto_scale import FoundGpus, choose_scale, resolve_scale
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.run.runner import run_recipe
from tests.support import recipes


def scale_of(**keys: Any) -> ScaleOptions:
    return ScaleOptions.model_validate({"name": "local", **keys})


@pytest.mark.parametrize(
    ("keys", "gpus", "workers", "share"),
    [
        ({}, 0, 0, 0.0),
        ({"address": "10.0.0.1:6379"}, 0, 1, 0.0),
        ({}, 1, 1, 1.0),
        ({}, 8, 8, 1.0),
        ({"gpus_per_worker": 0.5}, 2, 4, 0.5),
        ({"gpus_per_worker": 2.0}, 8, 4, 2.0),
        ({"gpus_per_worker": 0.0}, 8, 0, 0.0),
        ({"gpus_per_worker": 2.0}, 1, 1, 2.0),
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
        (FoundGpus(0), False, "chosen: this process on the CPUs, precision fp32", "fp32"),
        (FoundGpus(1, "H100"), True, "chosen: 1 worker on 1 GPU (H100), precision bf16, 7 decoding tasks", "bf16"),
        (
            FoundGpus(4, "V100"),
            False,
            "chosen: 4 workers on 4 GPUs (V100), precision fp16, 2 decoding tasks each",
            "fp16",
        ),
    ],
)
def test_choice_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: FoundGpus, bf16: bool, line: str, precision: str
) -> None:
    monkeypatch.setattr(auto_scale, "find_local_gpus", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(auto_scale, "count_usable_cpus", lambda: 8)
    monkeypatch.setattr(memory, "free_memory", lambda: 10**12)
    monkeypatch.setattr(auto_scale, "multiplies_bf16_faster", lambda: False)
    recipe, told = resolve_scale(automatic(tmp_path))
    assert told == line
    stage: Any = recipe.stages["pretrain"]
    assert stage.precision == precision
    assert recipe.scale.max_workers == gpus.count
    assert resolve_scale(recipe) == (recipe, None)


@pytest.mark.parametrize(
    ("cpus", "free", "keys", "tasks"),
    [
        (8, 10**12, {}, 7),
        (8, 10**12, {"scale__workers": 0}, 7),
        (8, 10**12, {"scale__cpus": 4}, 3),
        (64, 10**12, {}, 16),
        (2, 10**12, {}, 2),
        # Half of it has room for four.
        (64, 4 * 10**9, {}, 4),
        (64, 10**8, {}, 2),
        (64, 10**12, {"stream__tasks": 5}, 5),
    ],
)
def test_decoding_tasks_of_a_gpu_follow_cpus_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int, free: int, keys: dict[str, Any], tasks: int
) -> None:
    monkeypatch.setattr(auto_scale, "count_usable_cpus", lambda: cpus)
    monkeypatch.setattr(auto_scale, "find_local_gpus", lambda: FoundGpus(1, "H100"))
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    settings = {"scale__workers": 1, "scale__gpus_per_worker": 1.0, **keys}
    resolved, told = resolve_scale(recipes.recipe(tmp_path, **settings))
    assert resolved.stream.tasks == tasks
    assert told == (None if "stream__tasks" in keys else f"chosen: {tasks} decoding tasks")


@pytest.mark.parametrize(("workers", "gpus", "tasks"), [(1, 1.0, 7), (2, 1.0, 7), (4, 0.5, 3), (1, 4.0, 16)])
def test_gpus_that_are_left_keep_their_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, gpus: float, tasks: int
) -> None:
    """Four GPUs and 32 CPUs; trials of a search share them."""
    monkeypatch.setattr(auto_scale, "count_usable_cpus", lambda: 32)
    monkeypatch.setattr(auto_scale, "find_local_gpus", lambda: FoundGpus(4, "H100"))
    monkeypatch.setattr(memory, "free_memory", lambda: 10**12)
    resolved, _ = resolve_scale(recipes.recipe(tmp_path, scale__workers=workers, scale__gpus_per_worker=gpus))
    assert resolved.stream.tasks == tasks


def test_decoding_tasks_on_cpus_stay_as_they_are(tmp_path: Path) -> None:
    resolved, told = resolve_scale(recipes.recipe(tmp_path, scale__workers=1, scale__gpus_per_worker=0.0))
    assert told is None
    assert resolved.stream.tasks == "auto"
    assert (resolved.stream.count_tasks(on_ray=True), resolved.stream.count_tasks(on_ray=False)) == (2, 1)
    assert resolved.stream.count_tasks(on_ray=False, threads=12) == 3
    assert resolved.stream.count_tasks(on_ray=True, threads=12) == 2


@pytest.mark.parametrize(("side", "asked", "chosen"), [(8, "auto", 300), (224, "auto", 405), (224, 400, 400)])
def test_object_store_has_room_for_the_images_on_their_way(tmp_path: Path, side: int, asked: Any, chosen: int) -> None:
    """With two tasks, of batches of 256 images of 224 x 224: seven blocks of a batch, and four batches."""
    keys = {"dataset__image_size": side, "stages__evaluate__batch_size": 256, "scale__object_store_mb": asked}
    resolved, _ = resolve_scale(recipes.recipe(tmp_path, scale__workers=1, scale__gpus_per_worker=0.0, **keys))
    assert resolved.scale.object_store_mb == chosen
    assert resolve_scale(resolved) == (resolved, None)


def test_cpus_beside_idle_gpus_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("gains", "address", "precision"),
    [
        (True, "local", "bf16"),
        (False, "local", "fp32"),
        # The workers may be on other machines than the command.
        (True, "10.0.0.1:6379", "fp32"),
    ],
)
def test_precision_on_cpus_follows_their_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: bool, address: str, precision: str
) -> None:
    monkeypatch.setattr(auto_scale, "multiplies_bf16_faster", lambda: gains)
    monkeypatch.setattr(auto_scale, "find_local_gpus", lambda: FoundGpus(0))
    monkeypatch.setattr(auto_scale, "_find_cluster_gpus", lambda scale: FoundGpus(0))
    resolved, told = resolve_scale(automatic(tmp_path, address=address))
    stage: Any = resolved.stages["pretrain"]
    assert stage.precision == precision
    assert told is not None
    assert told.endswith(f"precision {precision}")


@pytest.mark.parametrize(
    ("gpus", "has_bf16", "gains", "address", "trained", "features"),
    [
        (0, False, True, "local", "bf16", "bf16"),
        (0, False, False, "local", "fp32", "fp32"),
        (1, True, False, "local", "bf16", "bf16"),
        # No loss would show that a feature is too large.
        (1, False, False, "local", "fp16", "fp32"),
        # Workers with other GPUs would compute other features.
        (2, True, False, "10.0.0.1:6379", "auto", "fp32"),
        (0, False, True, "10.0.0.1:6379", "fp32", "fp32"),
    ],
)
def test_frozen_features_have_one_precision_which_is_never_chosen_by_workers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    has_bf16: bool,
    gains: bool,
    address: str,
    trained: str,
    features: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(auto_scale, "multiplies_bf16_faster", lambda: gains)
    monkeypatch.setattr(auto_scale, "find_local_gpus", lambda: FoundGpus(gpus))
    monkeypatch.setattr(auto_scale, "_find_cluster_gpus", lambda scale: FoundGpus(gpus))
    recipe = automatic(tmp_path, address=address)
    both = recipe.dump()
    both["stages"]["evaluate"]["precision"] = "auto"
    alone = {**both, "stages": {"pretrain": {**both["stages"]["pretrain"], "precision": "fp32"}}}
    alone["stages"]["evaluate"] = both["stages"]["evaluate"]
    for raw, expected in ((both, trained), (alone, "fp32")):
        resolved, told = resolve_scale(parse_recipe(raw))
        stages: Any = resolved.stages
        assert (stages["pretrain"].precision, stages["evaluate"].precision) == (expected, features)
        assert told is not None
        assert (f"features in {features}" in told) == (raw is alone or trained != features)
        assert (f"precision {trained}" in told) == (raw is both and trained != "auto")


def test_run_prints_what_was_chosen_and_records_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_scale, "multiplies_bf16_faster", lambda: False)
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
