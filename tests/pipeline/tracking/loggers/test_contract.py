"""The calls that a logger gets about a run, from its start in MLflow to its end."""

from pathlib import Path

from PIL import Image

from firstlight.pipeline.tracking.client import TrackingClient
from tests.support import recipes
from tests.support.kept_logger import KeptLogger


def test_logger_gets_the_same_events_as_mlflow(kept: type[KeptLogger], tmp_path: Path) -> None:
    tracking = TrackingClient(recipes.recipe(tmp_path, tracking__loggers=["kept"]))
    tags = {"firstlight.kind": "pretrain", "mlflow.parentRunId": "p", "mlflow.note.content": "words"}
    run_id = tracking.start_run("pretrain seed 0", tmp_path / "a" / "mlflow.json", {"seed": 0}, tags)
    assert not kept.events, "a run without numbers has no log yet"
    tracking.log_metrics_once(run_id, [{"step": 4, "time": 9.5, "of": 8, "loss": 0.5, "lr": 0.1}], "a/")
    tracking.log_results(run_id, {"score": float("inf")})
    Image.new("L", (2, 2)).save(tmp_path / "map.png")
    for _ in range(2):
        tracking.log_figure(run_id, tmp_path / "map.png", "a map")
    tracking.finish_run(run_id, "KILLED")
    tracking.log_results(run_id, {"late": 1.0})
    found = {(number.key, number.step, number.value) for number in kept.kept[run_id]}
    history = [m for key in ("a/loss", "a/lr", "score") for m in tracking.client.get_metric_history(run_id, key)]
    assert found == {(m.key, m.step, m.value) for m in history}
    assert {number.time for number in kept.kept[run_id] if number.key == "a/loss"} == {9.5}
    whats = [what for _, what in kept.events]
    assert whats[0] == "open"
    assert whats[-2:] == ["image a map", "finish KILLED"]
    assert [name for name, _ in kept.images[run_id]] == ["figures/map"]
