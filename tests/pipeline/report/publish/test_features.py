"""Evaluations and retrievals: their keys in MLflow, and the index that is logged only if it is small."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.publish import features
from firstlight.pipeline.report.publish.features import EvaluatePublisher, RetrievePublisher
from firstlight.pipeline.report.publish.publisher import Score
from firstlight.pipeline.stages.features.feature_index import INDEX_FOLDER
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.recorded_tracking import RecordedTracking
from tests.support.stage_results import finished


def run_with(kind: str, metrics: dict[str, float]) -> Run:
    return Run("id", kind, kind, "FINISHED", 0.0, 1.0, None, "", None, {}, {}, metrics)


def test_scores_of_layers_have_those_of_random_weights_as_baseline() -> None:
    metrics = {"pretrained/knn_test": 0.5, "pretrained/probe_layer-2_test": 0.7, "random/probe_layer-2_test": 0.2}
    assert EvaluatePublisher().summarise(run_with("evaluate", metrics)) == {
        "kNN": Score(0.5, None, "random"),
        "probe layer -2": Score(0.7, 0.2, "random"),
    }


def test_numbers_of_a_layer_have_its_ending_and_no_weight_decay() -> None:
    result = {
        "signals_layer0": {"rankme": 3.0},
        "knn_layer0": {"val": 0.1, "test": 0.2},
        "probe_layer0": {"val": 0.3, "test": 0.4, "weight_decay": 1e-4},
    }
    assert features._list_numbers(result, "_layer0") == {
        "rankme_layer0": 3.0,
        "knn_layer0_val": 0.1,
        "knn_layer0_test": 0.2,
        "probe_layer0_val": 0.3,
        "probe_layer0_test": 0.4,
    }


def test_scores_over_the_bank_have_random_weights_without_a_bank_as_baseline() -> None:
    metrics = {"pretrained/knn_bank_test": 0.6, "pretrained/knn_test": 0.5, "random/knn_test": 0.2}
    assert EvaluatePublisher().summarise(run_with("evaluate", metrics)) == {
        "kNN of the bank": Score(0.6, 0.2, "random"),
        "kNN": Score(0.5, 0.2, "random"),
    }


def test_given_weights_stand_between_pretrained_and_random_ones() -> None:
    metrics = {"pretrained/knn_test": 0.5, "given/knn_test": 0.4, "random/knn_test": 0.2}
    assert EvaluatePublisher().summarise(run_with("evaluate", metrics)) == {
        "kNN": Score(0.5, 0.2, "random", given_value=0.4)
    }
    del metrics["pretrained/knn_test"]
    assert EvaluatePublisher().summarise(run_with("evaluate", metrics)) == {"kNN, given": Score(0.4, 0.2, "random")}
    found = {f"{arm}/mean_average_precision": score for arm, score in (("given", 0.4), ("random", 0.2))}
    assert RetrievePublisher().summarise(run_with("retrieve", found)) == {"mAP, given": Score(0.4, 0.2, "random")}
    assert RetrievePublisher().summarise(run_with("retrieve", found | {"pretrained/mean_average_precision": 0.5})) == {
        "mAP": Score(0.5, 0.2, "random", given_value=0.4)
    }


@pytest.mark.parametrize(("limit", "logged"), [(100, ["index.faiss", "manifest.json"]), (5, ["manifest.json"])])
def test_a_large_index_is_logged_by_its_manifest_only(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, limit: int, logged: list[str]
) -> None:
    monkeypatch.setattr(features, "MAX_LOGGED_INDEX_BYTES", limit)
    recipe = recipes.recipe(tmp_path, stages__retrieve={"kind": "retrieve"})
    worker = StageContext.create(recipe, digits, on_ray=False)
    query, *others = worker.splits.train[:4].tolist()
    shown = {"shown": [[query, others]], "precision": {"1": 0.5}, "mean_average_precision": 0.25}
    instance = finished(tmp_path, "retrieve", 0, {"pretrained": shown, "random": shown})
    (instance.folder / INDEX_FOLDER).mkdir()
    for name in ("index.faiss", "manifest.json"):
        (instance.folder / INDEX_FOLDER / name).write_bytes(b"x" * 10)
    tracking: Any = RecordedTracking()
    stage: Any = recipe.stages["retrieve"]
    RetrievePublisher().publish(tracking, "run", worker, stage, instance)
    assert tracking.files[INDEX_FOLDER] == logged
    assert tracking.results["pretrained/precision_at_1"] == 0.5
    assert tracking.results["random/mean_average_precision"] == 0.25
    assert {"neighbours_pretrained.png", "neighbours_random.png"} <= set(tracking.files["figures"])
