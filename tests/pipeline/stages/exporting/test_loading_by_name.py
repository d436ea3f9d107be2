"""A folder of a network of timm is loaded by its name, or the reason is told."""

from pathlib import Path

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.cards import model_card
from tests.support.exported_models import export_encoder


def test_folder_that_timm_does_not_load_by_its_name_is_reported(tmp_path: Path, digits: Store) -> None:
    spec = {"name": "timm", "model": "test_resnet", "normalize": "image"}
    instance, worker, _ = export_encoder(tmp_path, digits, spec, 64, formats=["timm"])
    result = instance.result
    assert result is not None
    reason = "encoder.normalize: image is no mean and standard deviation of all images"
    assert result["formats"]["timm"]["not_by_name"] == reason
    assert f"cannot load it by name: {reason}" in (instance.folder / "metrics.jsonl").read_text()
    assert f"`{reason}`" in model_card.render_card(worker, instance, [], [], {})
