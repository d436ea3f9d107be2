"""An encoder in MLflow, for tests of tracking."""

from pathlib import Path

from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient


def log_encoder(tracking: TrackingClient, folder: Path, register_as: str | None = None) -> tuple[str, str]:
    """Logs an encoder of one file. Returns its run and its reference."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text("{}")
    run_id = tracking.start_run("pretrain seed 0", folder / "mlflow.json", {}, {})
    return run_id, tracking.log_encoder(run_id, folder, StageInstance("pretrain", 0, "f", folder), register_as)
