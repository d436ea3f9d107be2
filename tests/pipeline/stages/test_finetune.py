"""The fine-tuning stage chooses each arm's learning rate on held-out images, and scores the choice on test images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetune import FinetuneStage
from firstlight.pipeline.stages.finetuning import kept_scores
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.metrics import read_metrics
from tests.support.finetunings import start_arm


@pytest.mark.parametrize("score_test", [True, False])
def test_chosen_rate_is_the_best_on_held_out_images(tmp_path: Path, digits: Store, score_test: bool) -> None:
    context, stage, instance, _ = start_arm(tmp_path, digits, "pretrained", score_test=score_test)
    kind = FinetuneStage()
    kind.run(context, stage, instance)
    result: Any = instance.result
    kind.result_shape(stage).validate_python(result)
    assert set(result["tried"]) == {f"{arm}-lr{rate}" for arm in ("pretrained", "scratch") for rate in (0.1, 0.3)}
    (measure,) = stage.measures
    for arm in ("pretrained", "scratch"):
        tried = {name: score for name, score in result["tried"].items() if name.startswith(arm)}
        assert result[arm]["val"] == max(tried.values()) == tried[f"{arm}-lr{result[arm]['lr']:g}"]
        assert kind.read_objective(stage, arm, instance) == result[arm]["val"]
        assert kind.read_score(stage, measure, arm, "test", instance) == result[arm].get("test")
        assert ("test" in result[arm]) == score_test
    assert read_model(kind.outputs(stage, instance)[0].path).facts["lr"] == result["pretrained"]["lr"]
    for file in kind.metrics_files(stage, instance):
        assert read_metrics(file.path)


def list_files(instance: StageInstance) -> list[str]:
    """Returns the files of an instance, without checkpoints, which have random names."""
    files = (file.relative_to(instance.folder) for file in instance.folder.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if "checkpoints" not in file.parts)


@pytest.mark.parametrize("score_test", [True, False])
def test_parts_in_rounds_leave_nothing_to_train_or_to_score(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, score_test: bool
) -> None:
    context, stage, instance, _ = start_arm(tmp_path, digits, "pretrained", score_test=score_test)
    kind, shared = FinetuneStage(), replace(instance, folder=tmp_path / "shared")
    kind.run(context, stage, instance)
    rounds = kind.list_rounds(stage)
    assert rounds == (
        ("pretrained-lr0.1", "pretrained-lr0.3", "scratch-lr0.1", "scratch-lr0.3"),
        ("pretrained", "scratch"),
    )
    for parts in rounds:
        for part in reversed(parts):
            kind.run_part(context, stage, shared, part)
    assert not shared.result_file.exists()
    kept = {name for name in list_files(shared) if name.endswith("_scores.json")}
    chosen = {f"{arm}-lr{instance.result[arm]['lr']:g}" for arm in rounds[1]} if instance.result else set()
    assert kept == {f"{name}/val_scores.json" for name in rounds[0]} | {
        f"{name}/test_scores.json" for name in chosen if score_test
    }
    with monkeypatch.context() as patch:
        patch.setattr(kept_scores, "score_tasks", lambda *arguments: pytest.fail("they are scored"))
        kind.run(context, stage, shared)
    assert shared.result == instance.result
    assert list_files(shared) == list_files(instance)


def test_arm_whose_trainings_are_those_of_another_one_is_left_to_the_end(tmp_path: Path, digits: Store) -> None:
    """Neither training of the arm `given` has scores of its own, as both are those of the arm `pretrained`."""
    context, stage, instance, _ = start_arm(tmp_path, digits, "given")
    object.__setattr__(instance, "encoder", instance.given)
    stage = Finetune.model_validate(stage.model_copy(update={"arms": ("pretrained", "given")}))
    kind, shared = FinetuneStage(), replace(instance, folder=tmp_path / "shared")
    kind.run(context, stage, instance)
    for parts in kind.list_rounds(stage):
        for part in parts:
            kind.run_part(context, stage, shared, part)
    assert not list(shared.folder.rglob("test_scores.json"))
    kind.run(context, stage, shared)
    assert shared.result == instance.result
    assert list_files(shared) == list_files(instance)


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({"arms": ("pretrained",), "learning_rates": (0.1,)}, ()),
        ({"arms": ("pretrained",), "learning_rates": (0.1, 0.3)}, (("pretrained-lr0.1", "pretrained-lr0.3"),)),
        (
            {"arms": ("pretrained", "scratch"), "learning_rates": (0.1,)},
            (("pretrained-lr0.1", "scratch-lr0.1"), ("pretrained", "scratch")),
        ),
    ],
)
def test_round_of_one_part_is_left_out(
    tmp_path: Path, digits: Store, changes: dict[str, Any], rounds: tuple[tuple[str, ...], ...]
) -> None:
    stage = start_arm(tmp_path, digits, "pretrained")[1]
    assert FinetuneStage().list_rounds(stage.model_copy(update=changes)) == rounds


def test_kill_before_the_result_is_written_leaves_no_kept_scores(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, stage, instance, _ = start_arm(tmp_path, digits, "pretrained")
    kind = FinetuneStage()
    for parts in kind.list_rounds(stage):
        for part in parts:
            kind.run_part(context, stage, instance, part)
    with monkeypatch.context() as patch:
        patch.setattr(StageInstance, "write_result", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            kind.run(context, stage, instance)
    assert not list(instance.folder.rglob("*_scores.json"))
    kind.run(context, stage, instance)
    assert instance.result is not None
    assert not list(instance.folder.rglob("*_scores.json"))
