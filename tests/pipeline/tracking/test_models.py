"""Encoders in the model registry."""

from pathlib import Path

from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.models import describe_versions, register_model
from tests.support.logged_encoder import log_encoder


def test_encoder_published_again_is_one_model_and_one_version(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id, reference = log_encoder(tracking, tmp_path / "a", "digits")
    assert log_encoder(tracking, tmp_path / "a", "digits") == (run_id, reference)
    assert [v.version for v in tracking.client.search_model_versions("name='digits'")] == [1]
    assert len(tracking.client.search_logged_models([tracking.experiment_id])) == 1


def test_description_is_that_of_every_version_of_a_run_and_of_no_other(
    tracking: TrackingClient, tmp_path: Path
) -> None:
    run_id, _ = log_encoder(tracking, tmp_path / "a", "digits")
    log_encoder(tracking, tmp_path / "b", "digits")
    register_model(tracking.client, "numbers", str(tracking.find_model(run_id)), run_id)
    describe_versions(tracking.client, run_id, "# A card")
    found = [*tracking.client.search_model_versions("name='digits'")]
    found += tracking.client.search_model_versions("name='numbers'")
    assert {version.run_id == run_id: version.description for version in found} == {True: "# A card", False: None}
    assert len(found) == 3
