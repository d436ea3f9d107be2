"""A stage that learns from a frozen network: its weights are found, saved once, decide the stage, and are resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.graph import ResolvedReferences, StageGraph
from firstlight.pipeline.run.preflight import check_recipe
from firstlight.pipeline.run.teacher_weights import resolve_teachers
from firstlight.pipeline.stages.artifacts.companions import TEACHER
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.artifacts.weights_origin import trace_teacher
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes

SPEC: dict[str, Any] = {"name": "convnet", "width": 5, "depth": 2, "input": "gray"}


def write_weights(file: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file({k: v.contiguous() for k, v in Encoder(SPEC, 12).state_dict().items()}, file)
    return file


def distilling(folder: Path, weights: str | None, **teacher: Any) -> Recipe:
    section = {**SPEC, "mean": [0.5] * 3, "std": [0.25] * 3, "weights": weights, **teacher}
    method = {"name": "distill", "teacher": section, "teacher_size": 12, "norm": "sync"}
    return recipes.recipe(folder / "runs", stages__pretrain__method=method)


def resolve(recipe: Recipe) -> ResolvedReferences:
    found, told = resolve_teachers(recipe, TrackingClient(recipe))
    assert [line.partition(":")[0] for line in told] == ["stages.pretrain.method.teacher.weights"]
    return ResolvedReferences(teachers=found)


def test_teacher_is_saved_with_its_origin(tmp_path: Path) -> None:
    file = write_weights(tmp_path / "teacher.safetensors")
    recipe = distilling(tmp_path, str(file), licence="MIT")
    teacher = resolve(recipe).teachers["pretrain"]
    assert (teacher.reference, teacher.facts["licence"], len(teacher.facts["sha256"])) == (str(file), "MIT", 64)
    saved = load_encoder(teacher.folder, 12).state_dict()
    torch.manual_seed(0)
    for name, tensor in Encoder(SPEC, 12).state_dict().items():
        assert torch.equal(saved[name], tensor), name
    told = trace_teacher(teacher.folder, str(file))
    assert (told["source"], told["sha256"]) == ("teacher.safetensors", teacher.facts["sha256"])


def test_content_of_a_teacher_decides_its_stage_and_its_place_does_not(tmp_path: Path, digits: Store) -> None:
    places = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        recipe = distilling(tmp_path, str(write_weights(tmp_path / name / "weights.safetensors", seed)))
        instance = StageGraph(recipe, tmp_path / "runs", digits.hash, resolve(recipe)).find_instance("pretrain", 0)
        assert instance.companions[TEACHER].is_dir()
        places.append(instance.folder.name)
    assert places[0] == places[1] != places[2]


@pytest.mark.parametrize(
    ("weights", "teacher", "message"),
    [
        (None, {}, "weights: is needed: a network of random weights has nothing to teach; valid: a file"),
        ("absent.safetensors", {}, "weights: 'absent.safetensors' does not exist"),
        ("FILE", {"width": 6}, "weights: .* shape"),
        ("FILE", {"mean": None}, "mean: is needed, since .*weights does not say what its images were normalised by"),
    ],
)
def test_teachers_that_cannot_be_had_are_refused_in_one_line(
    tmp_path: Path, weights: str | None, teacher: dict[str, Any], message: str
) -> None:
    file = str(write_weights(tmp_path / "teacher.safetensors"))
    recipe = distilling(tmp_path, file if weights == "FILE" else weights, **teacher)
    with pytest.raises(UserError, match=rf"^stages\.pretrain\.method\.teacher\.{message}") as found:
        resolve_teachers(recipe, TrackingClient(recipe))
    assert "\n" not in str(found.value)


def test_teacher_that_does_not_fit_is_refused_before_a_run(tmp_path: Path) -> None:
    file = str(write_weights(tmp_path / "teacher.safetensors"))
    with pytest.raises(UserError, match=r"^stages\.pretrain\.method\.teacher: images of 12 pixels are too small"):
        check_recipe(distilling(tmp_path, file, depth=6))
