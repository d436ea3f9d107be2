"""Loggers follow MLflow: nothing is doubled or lost, and a failure of one ends nothing."""

import atexit
import io
import math
import os
import signal
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.loggers.contract import LoggedNumber, LoggedRun
from firstlight.pipeline.tracking.loggers.group import LoggerGroup
from tests.support import mlflow_tables, recipes
from tests.support.clean_process import run_in_clean_process
from tests.support.kept_logger import KeptLogger, NumbersClient
from tests.support.logger_files import read_tensorboard, read_wandb

RUN = LoggedRun("ab12", "pretrain seed 0", "small", "firstlight", Path("/nowhere"))
NUMBERS = [LoggedNumber("loss", step, 1 / step, 1000.0 + step) for step in (1, 2, 3, 4)]


def open_group(client: NumbersClient) -> tuple[LoggerGroup, io.StringIO]:
    text = io.StringIO()
    group = LoggerGroup(["kept"], client, Console(file=text, width=200))  # type: ignore[arg-type]
    group.start_run(RUN)
    return group, text


def test_numbers_of_a_killed_process_are_neither_doubled_nor_lost(kept: type[KeptLogger]) -> None:
    """The first process was killed after MLflow had step 3 and before the logger had it."""
    group, _ = open_group(NumbersClient(NUMBERS[:2]))
    group.log_numbers(RUN.id, NUMBERS[:2])
    group, _ = open_group(NumbersClient(NUMBERS[:4]))
    group.log_numbers(RUN.id, NUMBERS[3:])
    group.log_numbers(RUN.id, NUMBERS[3:])
    assert kept.kept[RUN.id] == NUMBERS


def test_trials_that_end_out_of_order_keep_all_numbers(kept: type[KeptLogger]) -> None:
    group, _ = open_group(NumbersClient())
    for number in reversed(NUMBERS):
        group.log_numbers(RUN.id, [number])
    assert kept.kept[RUN.id] == NUMBERS[::-1]


@pytest.mark.parametrize("value", [0.1, math.nan, 1.8e308, 1e300])
def test_number_in_single_precision_is_the_same_number(kept: type[KeptLogger], value: float) -> None:
    number = LoggedNumber("score", 0, value, 1.0)
    kept.kept[RUN.id] = [number._replace(value=math.inf if value > 1e39 else float(f"{value:.9g}"))]
    group, _ = open_group(NumbersClient([number]))
    group.log_numbers(RUN.id, [number])
    assert len(kept.kept[RUN.id]) == 1
    group.log_numbers(RUN.id, [number._replace(value=0.2)])
    assert [found.value for found in kept.kept[RUN.id]][1:] == [0.2], "a changed result is logged"


@pytest.mark.parametrize("failing", ["open", "numbers", "finish FINISHED", "image x"])
def test_failing_logger_prints_one_note_and_is_left_out(kept: type[KeptLogger], tmp_path: Path, failing: str) -> None:
    kept.failing = failing
    group, log = open_group(NumbersClient())
    (tmp_path / "x.png").write_bytes(b"png")
    for number in NUMBERS:
        group.log_numbers(RUN.id, [number])
        group.log_image(RUN.id, "x", tmp_path / "x.png", "x")
    group.finish_run(RUN.id, "FINISHED")
    group.start_run(RUN)
    group.log_numbers(RUN.id, NUMBERS)
    (line,) = log.getvalue().splitlines()
    assert line.startswith("note the logger kept has failed (OSError: [Errno 28] No space left on device)")
    assert line.endswith("the work goes on without it, MLflow has all")


def test_logger_waits_for_mlflow_and_then_has_all(kept: type[KeptLogger]) -> None:
    client = NumbersClient(error=ConnectionError("Connection refused"))
    group, log = open_group(client)
    group.log_numbers(RUN.id, NUMBERS[:1])
    assert not kept.events
    client.numbers, client.error = NUMBERS[:2], None
    group.log_numbers(RUN.id, NUMBERS[2:])
    assert kept.kept[RUN.id] == NUMBERS
    assert log.getvalue() == "note the loggers of pretrain seed 0 wait for MLflow: connection refused\n"


def test_run_of_another_process_is_left_alone(kept: type[KeptLogger]) -> None:
    group, _ = open_group(NumbersClient())
    group.log_numbers("another", NUMBERS)
    group.finish_run("another", "KILLED")
    assert not kept.events


def train_and_log(root: Path, template: Path | None, begin: int, end: int) -> None:
    """Logs some of nine steps; kills itself if they are not the last."""
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        del os.environ[key]
    if template is not None:
        mlflow_tables.copy_tables_from(template, pytest.MonkeyPatch())
    tracking = TrackingClient(recipes.recipe(root, tracking__loggers=["tensorboard", "wandb"]))
    tags = {"firstlight.kind": "pretrain", "mlflow.note.content": "words"}
    run_id = tracking.start_run("pretrain seed 0", root / "a" / "mlflow.json", {"lr": 0.1}, tags)
    for step in range(begin, end):
        row = {"step": step, "time": 1000.0 + step, "of": 9, "loss": 1 / step, "time_data": 0.1 * step}
        tracking.log_metrics_once(run_id, [row])
        tracking.log_metrics_once(run_id, [row], "random-lr0.1/")
    if end < 9:
        os.kill(os.getpid(), signal.SIGKILL)
    tracking.log_results(run_id, {"pretrained/knn_test": 0.875, "odd name/a b": -3.5})
    Image.new("RGB", (3, 2)).save(root / "map.png")
    tracking.log_figure(run_id, root / "map.png", "a map")
    tracking.finish_run(run_id)
    # A forked process leaves these out when it ends.
    atexit._run_exitfuncs()


@pytest.mark.fault(8, "a training killed and resumed, in TensorBoard and Weights & Biases")
def test_mlflow_tensorboard_and_wandb_have_the_same_numbers_after_a_kill(tmp_path: Path) -> None:
    # No server could be reached: a request would fail, and be repeated for minutes.
    environment = {"https_proxy": "http://127.0.0.1:9"}
    codes = [
        run_in_clean_process(
            train_and_log, tmp_path, mlflow_tables.current_template, begin, end, environment=environment
        )
        for begin, end in ((1, 5), (4, 9))
    ]
    assert codes == [-signal.SIGKILL, 0]
    tracking = TrackingClient(recipes.recipe(tmp_path))
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    wanted = {
        key: [(m.step, m.value) for m in tracking.client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    assert [step for step, _ in wanted["random-lr0.1/loss"]] == list(range(1, 9))
    board, (folder,) = read_tensorboard(tmp_path)
    assert folder.parent.name == "small"
    assert board["scalars"].keys() == wanted.keys()
    for key, points in wanted.items():
        assert [step for step, _ in board["scalars"][key]] == [step for step, _ in points]
        assert [value for _, value in board["scalars"][key]] == pytest.approx([v for _, v in points], rel=1e-7)
    assert board["images"] == {"figures/map": (tmp_path / "map.png").read_bytes()}
    logs = read_wandb(tmp_path, run.info.run_id)
    assert {key: sorted(points) for key, points in logs["numbers"].items()} == wanted
    assert list(logs["images"]) == ["figures/map"]
    assert logs["config"] == {"lr": "0.1", "firstlight.kind": "pretrain"}
    assert logs["exit"] == 0
    assert logs["rows"] == list(range(len(logs["rows"]))), "W&B's own count of rows goes on"
