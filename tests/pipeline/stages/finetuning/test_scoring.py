"""Scores are those of the mean answers of all views, group scores are means over classes, and NaN is no number."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning.scoring import (
    add_group_scores,
    count_scored_classes,
    read_number,
    score_tasks,
)
from firstlight.pipeline.stages.finetuning.views import list_scored_views
from tests.support import recipes
from tests.support.finetunings import start_arm


def test_score_is_the_accuracy_of_the_mean_answers(tmp_path: Path, digits: Store) -> None:
    changes = {"stages__finetune__test_crops": 10, "stages__finetune__test_scale": 0.5}
    context, stage, _, task = start_arm(tmp_path, digits, "scratch", **changes)
    found = score_tasks(context, stage, {"one": task}, context.splits.test)["one"]
    ids, answers = context.splits.test, dict[int, float]()
    network: Any = task.eval()
    for views in (list_scored_views(context, stage), [context.recipe.dataset.eval_augment]):
        (batch,) = context.iterate_batches(ids, len(ids), views)
        predicted = network.mean_logits(batch).argmax(1).numpy()
        answers[len(views)] = float(np.mean(predicted == context.splits.labels[ids]))
    assert found["accuracy"] == pytest.approx(answers[10])
    assert answers[10] != answers[1]


def test_network_under_several_names_is_scored_once(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, stage, _, task = start_arm(tmp_path, digits, "scratch")
    other = start_arm(tmp_path / "other", digits, "scratch")[-1]
    kind, seen = type(task), list[int]()
    observe = kind.observe
    monkeypatch.setattr(kind, "observe", lambda self, batch: seen.append(id(self)) or observe(self, batch))
    found = score_tasks(context, stage, {"given": task, "other": other, "pretrained": task}, context.splits.test)
    assert list(found) == ["given", "other", "pretrained"]
    alone = score_tasks(context, stage, {"one": task}, context.splits.test)["one"]
    assert found["given"] == found["pretrained"] == alone
    assert seen.count(id(task)) == 2 * seen.count(id(other))


def open_groups(folder: Path) -> Any:
    """Returns a fine-tuning with two groups of classes, of a task that scores each class."""
    changes = {"stages__finetune__class_groups": {"some": ["a", "c"], "unseen": ["b"]}}
    task = {"stages__finetune__task": {"name": "multilabel"}, "stages__finetune__labels_per_class": None}
    return recipes.recipe(folder, **changes, **task).stages["finetune"]


def test_group_is_scored_by_the_mean_over_its_classes_that_occur(tmp_path: Path) -> None:
    scores: Any = {"map": 0.5, "ap": [1.0, math.nan, 0.5]}
    found = add_group_scores(open_groups(tmp_path), scores, ("a", "b", "c"))
    assert found.keys() == {"map", "ap", "map_some", "map_unseen"}
    assert found["map_some"] == 0.75
    assert math.isnan(read_number(None))
    assert isinstance(found["map_unseen"], float)
    assert math.isnan(found["map_unseen"])


def test_classes_without_a_score_are_counted(tmp_path: Path) -> None:
    stage = open_groups(tmp_path)
    held_out, test = {"map": 0.5, "ap": [1.0, None, None]}, {"map": 0.5, "ap": [1.0, None, 0.0]}
    assert count_scored_classes(stage, {"pretrained": {"scores": {"val": held_out, "test": test}}}) == (2, 3)
    assert count_scored_classes(stage, {"pretrained": {"scores": {"val": held_out}}}) == (1, 3)
    plain: Any = recipes.recipe(tmp_path).stages["finetune"]
    assert count_scored_classes(plain, {"pretrained": {"scores": {"val": {"accuracy": 0.5}}}}) is None
