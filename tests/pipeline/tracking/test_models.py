"""Encoders in the model registry."""

from pathlib import Path

from firstlight.pipeline.tracking.client import TrackingClient
from tests.support.logged_encoder import log_encoder


def test_encoder_published_again_is_one_model_and_one_version(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id, reference = log_encoder(tracking, tmp_path / "a", "digits")
    assert log_encoder(tracking, tmp_path / "a", "digits") == (run_id, reference)
    assert [v.version for v in tracking.client.search_model_versions("name='digits'")] == [1]
    assert len(tracking.client.search_logged_models([tracking.experiment_id])) == 1
