"""The command is stopped, killed or short of disk: exit code and last line, and the next command ends the same."""

import ast
import contextlib
import inspect
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from firstlight.pipeline.cli.main import run_guarded
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.run import launch
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from tests.support import command, recipes
from tests.support.state_hash import hash_state

STOPPED = "stopped; run the same command again to continue"
STEPS = 6

pytestmark = pytest.mark.usefixtures("blank_figures")


def written(folder: Path) -> tuple[Recipe, str]:
    """Writes the recipe file of the pretraining of the small recipe."""
    recipe = recipes.recipe(folder / "runs")
    del recipe.stages["evaluate"], recipe.stages["finetune"]
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe.dump()))
    return recipe, str(folder / "recipe.yaml")


def state_of(recipe: Recipe) -> tuple[str, list[int], list[float]]:
    """Returns a hash of the end state, the logged steps and losses. Asserts that MLflow has each step once."""
    (folder,) = (recipe.storage / recipe.name).glob("pretrain-seed0-*")
    found, _ = Checkpoints(folder / "checkpoints").read_newest()
    assert found is not None
    rows = read_metrics(folder / METRICS_FILE)
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert sorted(m.step for m in client.get_metric_history(run_id, "loss")) == [row["step"] for row in rows]
    return hash_state([found.shared, found.shards]), [row["step"] for row in rows], [row["loss"] for row in rows]


def statuses(recipe: Recipe) -> dict[str, str]:
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    experiment = client.get_experiment_by_name("firstlight")
    assert experiment is not None
    return {
        run_recipe.info.run_name: run_recipe.info.status
        for run_recipe in client.search_runs([experiment.experiment_id])
    }


def finished(folder: Path, file: str, **more: Any) -> str:
    code, output = command.start(folder / "again.txt", "run", file, **more).wait()
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[int], list[float]]:
    folder = tmp_path_factory.mktemp("clean")
    recipe, file = written(folder)
    finished(folder, file)
    found = state_of(recipe)
    assert found[1] == list(range(1, STEPS + 1))
    return found


@pytest.mark.fault(8, "the command is killed (SIGKILL) in the middle")
@pytest.mark.fault(9, "SIGTERM in the middle of a step")
@pytest.mark.fault(10, "Ctrl-C in the middle of a step, also twice")
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGKILL], -signal.SIGKILL),
    ],
    ids=["SIGTERM", "SIGINT", "SIGINT twice", "SIGKILL"],
)
def test_stopped_command_continues_to_the_same_bits(
    tmp_path: Path, clean: Any, signals: list[signal.Signals], code: int
) -> None:
    recipe, file = written(tmp_path)
    once = tmp_path / "once"
    running = command.start(
        tmp_path / "out.txt", "run", file, environment={"FIRSTLIGHT_FAULT": f"rank=0,step=4,kind=hang,once={once}"}
    )
    end = time.monotonic() + 120
    while not once.exists() and time.monotonic() < end and running.process.is_alive():
        time.sleep(0.05)
    assert once.exists(), (tmp_path / "out.txt").read_text()
    started = time.monotonic()
    for number in signals:
        # The first one may have ended it by then.
        with contextlib.suppress(ProcessLookupError):
            running.send(number)
        time.sleep(0.1)
    ended, output = running.wait()
    assert ended == code, output
    assert time.monotonic() - started < 30
    assert "Traceback" not in output
    if code > 0:
        assert output.splitlines()[-1] == STOPPED
    if len(signals) == 1 and code > 0:
        assert statuses(recipe) == {"small": "KILLED", "prepare": "FINISHED", "pretrain seed 0": "KILLED"}
    assert "continued from the checkpoint of step 3 of 6" in finished(tmp_path, file)
    assert state_of(recipe) == clean


@pytest.mark.fault(16, "full disk, wherever a run first meets it")
@pytest.mark.parametrize("largest_file", [4_096, 100_000])
def test_full_disk_is_one_line_and_the_next_run_finishes(tmp_path: Path, clean: Any, largest_file: int) -> None:
    recipe, file = written(tmp_path)
    code, output = command.start(tmp_path / "out.txt", "run", file, largest_file=largest_file).wait()
    assert code in (1, 2), output
    # Before it come at most the lines about the images.
    *others, line = output.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path) in line
    assert all(other.startswith(("  read ", "  classes")) for other in others), output
    run_recipe(recipe, Console(quiet=True))
    assert state_of(recipe) == clean


@pytest.mark.fault(24, "a storage that is deleted in the middle of a training")
@pytest.mark.parametrize("deleted", ["runs", "runs/small"])
def test_deleted_storage_is_a_one_line_error(tmp_path: Path, deleted: str) -> None:
    recipe = recipes.recipe(tmp_path / "runs", stages__pretrain__epochs=3000)
    del recipe.stages["evaluate"], recipe.stages["finetune"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.dump()))
    running = command.start(tmp_path / "out.txt", "run", str(tmp_path / "recipe.yaml"))
    end, written_file = time.monotonic() + 120, f"small/pretrain-*/checkpoints/*/{FOLDER_MANIFEST}"
    while not list(recipe.storage.glob(written_file)) and time.monotonic() < end and running.process.is_alive():
        time.sleep(0.05)
    # The folder is moved in one step: to delete the files one by one races with those that are written.
    os.rename(tmp_path / deleted, tmp_path / "gone")
    code, output = running.wait()
    assert code in (1, 2), output
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    assert line == output.splitlines()[-1]
    assert str(tmp_path / "runs") in line
    assert len(output.splitlines()) < 20, output


@pytest.mark.fault(16, "full disk: the file is named, whoever writes it")
def test_full_disk_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        append_json_line(Path("/dev/full"), {"step": 3})

    assert run_guarded(write) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == "error: /dev/full: No space left on device; "
        "what was finished is kept: run the same command again to continue"
    )


@pytest.mark.fault(56, "no home folder that can be written")
def test_home_folder_need_not_be_writable(tmp_path: Path, clean: Any) -> None:
    recipe, file = written(tmp_path)
    finished(tmp_path, file, environment={"HOME": "/proc/none"})
    assert state_of(recipe) == clean


@pytest.mark.fault(20, "Ray's own record of a run is damaged")
def test_rays_own_record_of_a_run_is_never_read_again() -> None:
    """Every trainer has a new name, so that Ray continues nothing by its own record; our checkpoints do."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(launch))) if isinstance(node, ast.Call)]
    (config,) = [call for call in calls if ast.unparse(call.func).endswith("RunConfig")]
    (name,) = [ast.unparse(word.value) for word in config.keywords if word.arg == "name"]
    assert "uuid.uuid4()" in name
    assert not [call for call in calls if ast.unparse(call.func).endswith(("restore", "get_checkpoint"))]


@pytest.mark.ray
@pytest.mark.fault(8, "the command is killed, under Ray: no process is left")
def test_killed_command_leaves_no_process_and_continues(tmp_path: Path) -> None:
    import psutil

    from tests.support.recipe_runs import on_ray

    recipe = on_ray(tmp_path / "runs")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.dump()))
    once = tmp_path / "once"
    running = command.start(
        tmp_path / "out.txt",
        "run",
        str(tmp_path / "recipe.yaml"),
        environment={"FIRSTLIGHT_FAULT": f"rank=1,step=4,kind=hang,once={once}"},
    )
    end = time.monotonic() + 900
    while not once.exists() and time.monotonic() < end and running.process.is_alive():
        time.sleep(0.2)
    assert once.exists(), (tmp_path / "out.txt").read_text()
    below = psutil.Process(running.process.pid).children(recursive=True)
    assert len(below) >= 3
    running.send(signal.SIGKILL)
    assert running.wait()[0] == -signal.SIGKILL
    _, alive = psutil.wait_procs(
        below, timeout=300
    )  # Ray's agents have a last word for their cluster, and wait a minute for it to answer
    assert not [other.cmdline() for other in alive]
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({**recipe.dump(), "scale": {**recipe.dump()["scale"], "workers": 0}})
    )
    assert "continued from the checkpoint of step 3 of 6" in finished(tmp_path, str(tmp_path / "recipe.yaml"))
