"""Scores that are kept are those that are found anew, and are not found again; damaged ones are."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning import kept_scores
from firstlight.pipeline.stages.finetuning.kept_scores import (
    find_scores,
    forget_scores,
    keep_scores,
    read_kept_scores,
)
from firstlight.pipeline.stages.finetuning.scoring import score_tasks
from tests.support.finetunings import start_arm


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Returns the names of the networks of each call of `score_tasks`, which are added later."""
    calls = list[list[str]]()

    def note_call(context: Any, stage: Any, tasks: Any, ids: Any) -> Any:
        calls.append(list(tasks))
        return score_tasks(context, stage, tasks, ids)

    monkeypatch.setattr(kept_scores, "score_tasks", note_call)
    return calls


def test_kept_scores_are_those_that_were_found(tmp_path: Path, digits: Store, scored: list[list[str]]) -> None:
    context, stage, instance, task = start_arm(tmp_path, digits, "scratch")
    other = start_arm(tmp_path / "other", digits, "pretrained")[-1]
    splits = {"val": context.splits.val, "test": context.splits.test}
    expected = {split: score_tasks(context, stage, {"a": task, "b": other}, ids) for split, ids in splits.items()}
    assert expected["val"]["a"] != expected["test"]["a"]
    keep_scores(context, stage, instance, "a", task, "val")
    assert scored == [["a"]]
    assert find_scores(context, stage, instance, {"a": task, "b": other}, "val") == expected["val"]
    assert scored == [["a"], ["b"]]
    assert find_scores(context, stage, instance, {"a": task}, "test")["a"] == expected["test"]["a"]
    assert scored == [["a"], ["b"], ["a"]], "another split"
    keep_scores(context, stage, instance, "a", task, "val")
    assert len(scored) == 3, "they are kept already"


def test_scores_of_classes_that_do_not_occur_are_kept(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, stage, instance, task = start_arm(tmp_path, digits, "scratch")
    scores = {"a": {"map": 1 / 3, "ap": [0.1, None, 1.0], "unseen": None}}
    monkeypatch.setattr(kept_scores, "score_tasks", lambda *arguments: scores)
    keep_scores(context, stage, instance, "a", task, "val")
    assert read_kept_scores(instance, "a", "val") == scores["a"]


def test_two_trainings_that_are_one_are_scored_once(tmp_path: Path, digits: Store, scored: list[list[str]]) -> None:
    context, stage, instance, task = start_arm(tmp_path, digits, "scratch")
    keep_scores(context, stage, instance, "b", task, "val")
    found = find_scores(context, stage, instance, {"a": task, "b": task}, "val")
    assert found["a"] == found["b"] == read_kept_scores(instance, "b", "val")
    assert scored == [["b"]]


def test_damaged_file_is_scored_again(tmp_path: Path, digits: Store) -> None:
    context, stage, instance, task = start_arm(tmp_path, digits, "scratch")
    keep_scores(context, stage, instance, "a", task, "val")
    expected = read_kept_scores(instance, "a", "val")
    (file,) = (instance.folder / "a").iterdir()
    file.write_text(file.read_text().replace("accuracy", "accurate"))
    assert read_kept_scores(instance, "a", "val") is None
    assert find_scores(context, stage, instance, {"a": task}, "val") == {"a": expected}


def test_several_workers_do_not_look_for_files(tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    context, stage, instance, task = start_arm(tmp_path, digits, "scratch")
    keep_scores(context, stage, instance, "a", task, "val")
    assert read_kept_scores(instance, "a", "val")
    monkeypatch.setattr(kept_scores, "world_size", lambda: 2)
    assert read_kept_scores(instance, "a", "val") is None


def test_forgotten_scores_leave_no_file(tmp_path: Path, digits: Store) -> None:
    context, stage, instance, task = start_arm(tmp_path, digits, "scratch")
    for split in ("val", "test"):
        keep_scores(context, stage, instance, "a", task, split)
    assert len(list((instance.folder / "a").iterdir())) == 2
    forget_scores(instance, ["a", "never trained"])
    assert not list((instance.folder / "a").iterdir())
