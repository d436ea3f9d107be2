"""Exports: the largest difference and the bytes of each format, and the files, are logged."""

from pathlib import Path
from typing import Any

from firstlight.pipeline.report.publish.exports import ExportPublisher
from firstlight.pipeline.stages.export import EXPORT_FOLDER
from tests.support.recorded_tracking import RecordedTracking
from tests.support.stage_results import finished


def test_largest_difference_and_total_bytes_of_a_format_are_logged(tmp_path: Path) -> None:
    result = {
        "formats": {
            "onnx": {
                "difference": {"store": {"relative": 1e-6}, "random 1": {"relative": 1e-5}},
                "files": {"encoder.onnx": {"bytes": 100}, "encoder.onnx.data": {"bytes": 20}},
            }
        }
    }
    instance = finished(tmp_path, "export", 0, result)
    (instance.folder / EXPORT_FOLDER / "onnx").mkdir(parents=True)
    tracking: Any = RecordedTracking()
    stage: Any = None
    ExportPublisher().publish(tracking, "run", stage, stage, instance)
    assert tracking.results == {"onnx/relative_difference": 1e-5, "onnx/bytes": 120}
    assert tracking.files == {EXPORT_FOLDER: ["onnx"]}
    assert tracking.texts == {"export.json": result}
