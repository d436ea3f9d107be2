"""References to encoders: aliases, beginnings of run ids, and the runs that made them."""

from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.references import find_source_run, pin_reference
from tests.support.logged_encoder import log_encoder


def test_source_of_an_encoder_is_logged(tracking: TrackingClient, tmp_path: Path) -> None:
    made_by, reference = log_encoder(tracking, tmp_path / "a", "digits")
    run_id = tracking.start_run("finetune seed 0", tmp_path / "b" / "mlflow.json", {}, {})
    pinned = pin_reference(tracking, "models:/digits@current", "stages.finetune.encoder")
    assert pinned == "models:/digits/1", "an alias moves, a version does not"
    tracking.log_encoder_source(run_id, pinned, find_source_run(tracking, pinned))
    found = tracking.client.get_run(run_id)
    assert found.data.tags["firstlight.encoder"] == "models:/digits/1"
    assert found.data.tags["firstlight.encoder_run"] == made_by
    assert [f"models:/{model.model_id}" for model in found.inputs.model_inputs] == [reference]


def test_run_id_may_be_shortened(tracking: TrackingClient, tmp_path: Path) -> None:
    run_id, _ = log_encoder(tracking, tmp_path / "a", None)
    assert pin_reference(tracking, f"runs:/{run_id[:8]}/encoder", "x") == f"runs:/{run_id}/encoder"
    assert pin_reference(tracking, f"runs:/{run_id}/encoder", "x") == f"runs:/{run_id}/encoder"
    with pytest.raises(UserError, match=r"^stages.x.encoder: 'runs:/zz/encoder': no run begins with 'zz' in sqlite:"):
        pin_reference(tracking, "runs:/zz/encoder", "stages.x.encoder")
