"""Keys that MLflow accepts."""

from pathlib import Path

import pytest

from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.metric_keys import (
    MAX_PART_LENGTH,
    remove_refused_characters,
    sanitize_metric_key,
    unique_key_parts,
)

CLASSES = ["cat", "big dog", "a/b", "a_b", "", "..", "x" * 300, "x" * 301, "50 %", "50 $"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("retrieve.precision@5", "retrieve.precision_at_5"),
        ("evaluate/kNN, k=5", "evaluate/kNN k5"),
        ("a-b_c.d: e/f", "a-b_c.d: e/f"),
    ],
)
def test_sanitized_key_has_at_for_the_sign_and_no_refused_characters(name: str, key: str) -> None:
    assert sanitize_metric_key(name) == key


def test_removing_refused_characters_keeps_no_at_sign() -> None:
    assert remove_refused_characters("fine@tune, 2") == "finetune 2"


def test_key_parts_of_classes_are_unique() -> None:
    parts = unique_key_parts(CLASSES)
    assert parts[:4] == ["cat", "big dog", "a_b 2", "a_b"]
    assert parts[4:6] == ["class 4", "class 5"]
    assert parts[6:8] == ["x" * MAX_PART_LENGTH + " 6", "x" * MAX_PART_LENGTH + " 7"]
    assert parts[8:] == ["50 _", "50 _ 9"]
    assert len({*parts}) == len(CLASSES)


def test_mlflow_accepts_the_keys(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id = tracking.start_run("a", tmp_path / "a" / "mlflow.json", {}, {})
    values = {f"test_iou/{part}": float(k) for k, part in enumerate(unique_key_parts(CLASSES))}
    values[sanitize_metric_key("retrieve.precision@5")] = 0.5
    tracking.log_results(run_id, values)
    assert tracking.client.get_run(run_id).data.metrics == values
