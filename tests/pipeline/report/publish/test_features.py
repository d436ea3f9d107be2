"""Evaluations and retrievals: their keys in MLflow, and the index that is logged only if it is small."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.publish import features
from firstlight.pipeline.report.publish.features import RetrievePublisher
from firstlight.pipeline.stages.features.feature_index import INDEX_FOLDER
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.recorded_tracking import RecordedTracking
from tests.support.stage_results import finished


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


@pytest.mark.parametrize(("limit", "logged"), [(100, ["index.faiss", "manifest.json"]), (5, ["manifest.json"])])
def test_a_large_index_is_logged_by_its_manifest_only(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, limit: int, logged: list[str]
) -> None:
    monkeypatch.setattr(features, "MAX_LOGGED_INDEX_BYTES", limit)
    recipe = recipes.recipe(tmp_path, stages__retrieve={"kind": "retrieve"})
    context = StageContext.create(recipe, digits, on_ray=False)
    query, *others = context.splits.train[:4].tolist()
    shown = {"shown": [[query, others]], "precision": {"1": 0.5}, "mean_average_precision": 0.25}
    instance = finished(tmp_path, "retrieve", 0, {"pretrained": shown, "random": shown})
    (instance.folder / INDEX_FOLDER).mkdir()
    for name in ("index.faiss", "manifest.json"):
        (instance.folder / INDEX_FOLDER / name).write_bytes(b"x" * 10)
    tracking: Any = RecordedTracking()
    stage: Any = recipe.stages["retrieve"]
    RetrievePublisher().publish(tracking, "run", context, stage, instance)
    assert tracking.files[INDEX_FOLDER] == logged
    assert tracking.results["pretrained/precision_at_1"] == 0.5
    assert tracking.results["random/mean_average_precision"] == 0.25
    assert {"neighbours_pretrained.png", "neighbours_random.png"} <= set(tracking.files["figures"])
