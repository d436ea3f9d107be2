"""The results of the instances that a process is given, and its answer if it ended early."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run.launching.instances import PART_KEY, run_instances
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from tests.support import recipes

CPU = torch.device("cpu")


def make_payload(recipe: Recipe, store: Store, folder: Path, *seeds: int) -> dict[str, Any]:
    made = [asdict(StageInstance("pretrain", seed, "f", folder / f"seed{seed}")) for seed in seeds]
    instances = [{k: str(v) if isinstance(v, Path) else v for k, v in fields.items()} for fields in made]
    return {"recipe": recipe.dump(), "store": str(store.path), "instances": instances}


def test_instances_may_come_one_after_the_other(tmp_path: Path, digits: Store) -> None:
    payload, begun = make_payload(recipes.recipe(tmp_path), digits, tmp_path, 0, 1), []

    def hand_over() -> Any:
        for fields in payload["instances"]:
            begun.append((fields["seed"], (tmp_path / "seed0" / "result.json").exists()))
            yield fields

    assert run_instances({**payload, "instances": hand_over()}, False, CPU) == {"stop": None}
    assert begun == [(0, False), (1, True)]
    assert (tmp_path / "seed1" / "result.json").exists()


def test_a_loss_that_is_not_finite_is_returned_and_ends_the_instances(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path, stages__pretrain__optimizer__lr=1e38)
    answer = run_instances(make_payload(recipe, digits, tmp_path, 0, 1), False, CPU)
    assert answer["kind"] == "StopTraining"
    assert "is not finite" in answer["stop"]
    assert not (tmp_path / "seed1").exists()


def test_another_error_is_raised_and_recorded(tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failures.FAULT_VARIABLE, "rank=0,step=1,kind=raise")
    with pytest.raises(RuntimeError, match="injected fault"):
        run_instances(make_payload(recipes.recipe(tmp_path), digits, tmp_path, 0), False, CPU)
    assert "injected fault" in (tmp_path / "seed0" / failures.FAILURE_FILES.replace("*", "0")).read_text()


def test_a_part_of_an_instance_is_done_without_the_rest(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, done = recipes.recipe(tmp_path), []
    kind = type(stage_kind(recipe.stages["pretrain"]))
    monkeypatch.setattr(
        kind, "run_part", lambda kind, context, stage, instance, part: done.append((instance.seed, part))
    )
    payload = make_payload(recipe, digits, tmp_path, 4)
    parts = [{**payload["instances"][0], PART_KEY: part} for part in ("a", "b")]
    assert run_instances({**payload, "instances": parts}, False, CPU) == {"stop": None}
    assert done == [(4, "a"), (4, "b")]
    assert not (tmp_path / "seed4").exists(), "it is no attempt at the instance"


def test_an_error_of_a_part_is_recorded_with_its_instance(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed4").mkdir()
    payload = make_payload(recipes.recipe(tmp_path), digits, tmp_path, 4)
    parts = [{**payload["instances"][0], PART_KEY: "a"}]
    with pytest.raises(NotImplementedError, match="PretrainStage has no parts"):
        run_instances({**payload, "instances": parts}, False, CPU)
    assert "has no parts" in (tmp_path / "seed4" / failures.FAILURE_FILES.replace("*", "0")).read_text()
