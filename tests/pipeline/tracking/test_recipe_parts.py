"""Models of stages on the run of their recipe."""

from pathlib import Path

from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.recipe_parts import link_models


def log_model(tracking: TrackingClient, folder: Path, seed: int, parent: str) -> str:
    """Returns the run of a stage that has logged a model."""
    tags = {"mlflow.parentRunId": parent, "firstlight.kind": "pretrain"}
    run_id = tracking.start_run(f"pretrain seed {seed}", folder / f"{seed}.json", {}, tags)
    (folder / "encoder").mkdir(exist_ok=True)
    (folder / "encoder" / "encoder.json").write_text("{}")
    tracking.log_encoder(run_id, folder / "encoder", StageInstance("pretrain", seed, "f", folder), None)
    return run_id


def test_models_are_shown_once_and_stay_those_of_their_runs(tracking: TrackingClient, tmp_path: Path) -> None:
    parent = tracking.start_run("small", tmp_path / "parent.json", {}, {"firstlight.recipe": "small"})
    runs = [log_model(tracking, tmp_path, seed, parent) for seed in (0, 1)]
    without = tracking.start_run("evaluate", tmp_path / "evaluate.json", {}, {"firstlight.kind": "evaluate"})
    for stage_runs in ((runs[0], without), (runs[0], runs[1]), (runs[0], runs[1])):
        link_models(tracking, parent, stage_runs)
    shown = [model.model_id for model in tracking.client.get_run(parent).outputs.model_outputs]
    assert sorted(shown) == sorted(tracking.find_model(run) or "" for run in runs)
    lineage, _ = read_lineage(tracking.location)
    assert lineage.runs[parent].model is None
    assert lineage.find_run(f"models:/{shown[0]}").id in runs
