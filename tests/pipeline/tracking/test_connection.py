"""First connections to MLflow: many processes at once, killed processes, and servers that do not answer."""

import contextlib
import multiprocessing
import os
import socket
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import exclusive_lock
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking import connection, retry
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.connection import connect_client, open_experiment
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.references import fetch_reference, read_json_artifact
from firstlight.pipeline.tracking.retry import RetryingClient
from tests.support import recipes
from tests.support.clean_process import run_in_clean_process

# The number of writers, and what every one writes: steps, steps in one request, and encoders.
WRITERS, STEPS, BATCH, ENCODERS = 8, 150, 10, 2


def write_as_trial(storage: Path, k: int) -> None:
    """Does what a trial does, on a database that does not exist yet."""
    folder = storage / f"writer{k}"
    tracking = TrackingClient(recipes.recipe(storage, name=f"writer{k}"))
    run_id = tracking.start_run(f"writer {k}", folder / "mlflow.json", {"k": k}, {"firstlight.recipe": f"writer{k}"})
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    (encoder / "encoder.safetensors").write_bytes(bytes(k))
    for first in range(1, STEPS + 1, BATCH):
        tracking.log_metrics(
            run_id,
            [{"step": s, "time": 1000.0 + s, "loss": s / 7, "accuracy": k / 8} for s in range(first, first + BATCH)],
        )
        tracking.client.set_tag(run_id, f"tag{first}", str(k))
        if first % 50 == 1:
            tracking.client.log_text(run_id, str(first), f"texts/{first}.txt")
    for n in range(ENCODERS):
        own = tracking.start_run(
            f"encoder {n} of {k}", folder / f"{n}" / "mlflow.json", {}, {"mlflow.parentRunId": run_id}
        )
        tracking.log_encoder(own, encoder, StageInstance("pretrain", n, f"{k}-{n}", encoder), "shared")
        tracking.finish_run(own)
    tracking.finish_run(run_id)


@pytest.mark.fault(42, "eight writers on a fresh SQLite file")
@pytest.mark.timeout(600)
def test_eight_processes_on_a_fresh_database_lose_no_write(tmp_path: Path) -> None:
    started = [
        multiprocessing.get_context("fork").Process(target=write_as_trial, args=(tmp_path, k)) for k in range(WRITERS)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=580)
    assert [process.exitcode for process in started] == [0] * WRITERS
    tracking = TrackingClient(recipes.recipe(tmp_path))
    client = tracking.client
    assert len(client.search_experiments(filter_string="name = 'firstlight'")) == 1
    found = {run.info.run_name: run for run in client.search_runs([tracking.experiment_id])}
    assert len(found) == WRITERS * (1 + ENCODERS)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    for k in range(WRITERS):
        run = found[f"writer {k}"]
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((m.step, m.value) for m in history) == [(step, step / 7) for step in range(1, STEPS + 1)]
        assert {key: run.data.tags[key] for key in run.data.tags if key.startswith("tag")} == {
            f"tag{s}": str(k) for s in range(1, STEPS, BATCH)
        }
        assert len(client.list_artifacts(run.info.run_id, "texts")) == len(range(1, STEPS, 50))
    versions = client.search_model_versions("name='shared'")
    assert sorted(int(v.version) for v in versions) == list(range(1, WRITERS * ENCODERS + 1))
    assert len({v.run_id for v in versions}) == WRITERS * ENCODERS
    assert client.get_model_version_by_alias("shared", "current").run_id in {v.run_id for v in versions}


@pytest.mark.parametrize("name", ["100%", "a?b", "a#b c", "ünï", "50%20x"])
def test_storage_of_any_name_works_and_nothing_is_left_outside(tmp_path: Path, name: str) -> None:
    storage = tmp_path / name
    tracking = TrackingClient(recipes.recipe(storage))
    run_id = tracking.start_run("a", storage / "a" / "mlflow.json", {"k": 1}, {})
    (tmp_path / name / "f.txt").write_text("x")
    tracking.client.log_artifact(run_id, str(storage / "f.txt"), "sub folder")
    tracking.client.log_dict(run_id, {"a": 1}, "d.json")
    lineage, client = read_lineage(tracking.location)
    assert read_json_artifact(lineage.runs[run_id], "d.json") == {"a": 1}
    reference = fetch_reference(tracking, f"runs:/{run_id}/sub folder", storage / "fetched", "x")
    assert (reference / "f.txt").read_text() == "x"
    assert [file.path for file in client.list_artifacts(run_id)] == ["d.json", "sub folder"]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert {"mlflow.db", "mlartifacts", "fetched", "a"} <= {file.name for file in storage.iterdir()}


@pytest.mark.fault(41, "a database that cannot be opened")
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("folder", "unable to open database file"),
        ("garbage", "file is not a database"),
        ("cut", "database disk image is malformed"),
    ],
)
def test_database_that_cannot_be_opened_is_one_line_in_time(tmp_path: Path, damage: str, told: str) -> None:
    recipe, file = recipes.recipe(tmp_path), tmp_path / "mlflow.db"
    if damage == "folder":
        file.mkdir()
    elif damage == "garbage":
        file.write_bytes(b"x" * 10_000)
    else:
        TrackingClient(recipe)
        file.write_bytes(file.read_bytes()[:50_000])
    for use in (lambda: TrackingClient(recipe), lambda: read_lineage(TrackingLocation.of(recipe))):
        started = time.monotonic()
        with pytest.raises(UserError, match=rf"^tracking.uri: 'sqlite:.*/mlflow.db' cannot be (used|read): {told}$"):
            use()
        assert time.monotonic() - started < 15


def change_shared_rows(storage: Path, k: int, meeting: Any) -> None:
    """Writes the rows that other processes write at the same time, round after round."""
    location = TrackingLocation.of(recipes.recipe(storage))
    client: Any = RetryingClient(connect_client(location.uri))
    run_id = (storage / "run").read_text()
    for turn in range(ROUNDS):
        meeting.wait(timeout=120)
        client.set_tag(run_id, f"tag{turn}", str(k))
        client.set_experiment_tag("0", f"tag{turn}", str(k))
        client.set_registered_model_alias("shared", f"alias{turn}", "1")
        client.set_registered_model_tag("shared", f"tag{turn}", str(k))
        client.log_metric(run_id, "loss", 0.5, timestamp=1000, step=turn)
        client.log_param(run_id, f"p{turn}", "same")
        open_experiment(replace(location, experiment=f"experiment{turn}"))


# Processes that write the same new rows at the same moment, and how often.
MEETING, ROUNDS = 6, 15


@pytest.mark.fault(42, "many writers of the same rows")
@pytest.mark.timeout(900)
def test_writers_of_the_same_rows_repeat_their_calls(tmp_path: Path) -> None:
    tracking = TrackingClient(recipes.recipe(tmp_path))
    run_id = tracking.start_run("a", tmp_path / "a" / "mlflow.json", {}, {})
    (tmp_path / "run").write_text(run_id)
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "encoder.safetensors").write_bytes(b"x")
    tracking.log_encoder(run_id, encoder, StageInstance("pretrain", 0, "f", encoder), "shared")
    context = multiprocessing.get_context("fork")
    meeting = context.Barrier(MEETING)
    started = [context.Process(target=change_shared_rows, args=(tmp_path, k, meeting)) for k in range(MEETING)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=800)
    assert [process.exitcode for process in started] == [0] * MEETING
    model = tracking.client.get_registered_model("shared")
    assert {alias for alias in model.aliases if alias.startswith("alias")} == {f"alias{k}" for k in range(ROUNDS)}
    assert len(tracking.client.get_metric_history(run_id, "loss")) == ROUNDS
    names = {experiment.name for experiment in tracking.client.search_experiments()}
    assert {f"experiment{k}" for k in range(ROUNDS)} <= names


def use_as_another_user(storage: Path, output: Path) -> None:
    """Starts to use a storage as a user who may not write there."""
    # The recipe is read before: the other user may not be allowed to read this Python's library, from which checks
    # import.
    recipe = recipes.recipe(storage)
    os.setgroups([])
    os.setgid(65_534)
    os.setuid(65_534)
    told = []
    for use in (
        lambda: TrackingClient(recipe),
        lambda: exclusive_lock(storage / "small", "small").__enter__(),
        lambda: exclusive_lock(storage / "new", "new").__enter__(),
    ):
        try:
            use()
        except UserError as error:
            told.append(str(error))
    output.write_text("\n".join(told))


@pytest.mark.fault(24, "a storage of another user")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_storage_of_another_user_is_one_line_with_file_and_owner(tmp_path: Path) -> None:
    storage, output = tmp_path / "runs", tmp_path / "told.txt"
    TrackingClient(recipes.recipe(storage))
    with exclusive_lock(storage / "small", "small"):
        pass
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 == 0:
            folder.chmod(folder.stat().st_mode | 0o005)
        if folder == Path("/tmp"):
            break
    output.touch()
    output.chmod(0o666)
    assert run_in_clean_process(use_as_another_user, storage, output) == 0
    owner = "root; valid: another storage=, or the right to write there"
    assert output.read_text().splitlines() == [
        f"{storage}/.mlflow.lock: cannot be written: it belongs to {owner}",
        f"{storage}/small/.lock: cannot be written: it belongs to {owner}",
        f"{storage}/new: cannot be written: {storage} belongs to {owner}",
    ]


def test_two_storages_with_one_database_share_its_lock(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/shared.db"
    started = time.monotonic()
    first = TrackingClient(recipes.recipe(tmp_path / "a", tracking__uri=uri))
    second = TrackingClient(recipes.recipe(tmp_path / "b", tracking__uri=uri))
    assert first.experiment_id == second.experiment_id
    assert (tmp_path / ".mlflow.lock").exists()
    assert time.monotonic() - started < 120


@pytest.mark.fault(42, "killed while it made the tables")
def test_process_killed_while_creating_tables_leaves_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.recipe(tmp_path)

    def killed(temporary: Path, file: Path) -> None:
        temporary.write_bytes(temporary.read_bytes()[:4096])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("firstlight.pipeline.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            TrackingClient(recipe)
    assert not (tmp_path / "mlflow.db").exists()
    assert TrackingClient(recipe).client.get_experiment_by_name("firstlight") is not None


@pytest.mark.fault(41, "an MLflow server that never answers")
def test_server_that_never_answers_raises_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = retry.SHORT_TIMEOUT_S * (1 + retry.SHORT_TIMEOUT_RETRIES)
    assert longest < 15
    monkeypatch.setattr(retry, "SHORT_TIMEOUT_S", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri, started = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(UserError, match=f"^tracking.uri: '{uri}' cannot be used: read timed out$"):
            TrackingClient(recipes.recipe(tmp_path, tracking__uri=uri))
        assert time.monotonic() - started < 15 - longest
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60", "only the first request has a short timeout"


@pytest.fixture
def made_by_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Empties the cache folder; returns the databases that MLflow makes by its migrations, which are added later."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made, create = list[Path](), connection._let_mlflow_create

    def note_database(database: Path, temporary: Path) -> None:
        made.append(database)
        create(database, temporary)

    monkeypatch.setattr(connection, "_let_mlflow_create", note_database)
    return made


def open_database(folder: Path) -> Any:
    """Opens the experiment of a new database, and returns its client and all that the database declares."""
    client, experiment = open_experiment(TrackingLocation.of(recipes.recipe(folder)))
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "loss", 0.5, step=3)
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")] == [0.5]
    names = {found.name: found.artifact_location for found in client.search_experiments()}
    assert set(names) == {"Default", "firstlight"}
    assert names["Default"].startswith(os.getcwd()), "it is of this process, not of the one that made the tables"
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        declared = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
        version = database.execute("SELECT version_num FROM alembic_version").fetchall()
    return sorted(map(str, declared)), version


def test_tables_of_a_new_database_are_kept_for_the_next(
    tmp_path: Path, made_by_mlflow: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_database(tmp_path / "first")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_database(tmp_path / "second") == first
    assert [database.parent.name for database in made_by_mlflow] == ["first"]


def test_tables_of_another_version_and_damaged_ones_are_made_again(
    tmp_path: Path, made_by_mlflow: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    first = open_database(tmp_path / "first")
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(kept.read_text().replace("lifecycle_stage", "lifecycle_state"))
    assert open_database(tmp_path / "second") == first
    monkeypatch.setattr(mlflow, "__version__", "99.0")
    assert open_database(tmp_path / "third") == first
    assert [database.parent.name for database in made_by_mlflow] == ["first", "second", "third"]


def test_cache_folder_that_cannot_be_written_costs_time_only(
    tmp_path: Path, made_by_mlflow: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_database(tmp_path / "first") == open_database(tmp_path / "second")
    assert len(made_by_mlflow) == 2


@pytest.mark.parametrize("fact", [{}, {"script": 7}, {"script": ""}, {"script": "CREATE nonsense;"}])
def test_kept_tables_that_mean_nothing_are_made_again(
    tmp_path: Path, made_by_mlflow: list[Path], fact: dict[str, Any]
) -> None:
    first = open_database(tmp_path / "first")
    (kept,) = (tmp_path / "cache").rglob("*.json")
    write_sealed_json(kept, fact)
    assert open_database(tmp_path / "second") == first
    assert open_database(tmp_path / "third") == first
    assert [database.parent.name for database in made_by_mlflow] == ["first", "second"]


def test_database_that_cannot_be_copied_is_still_made(
    tmp_path: Path, made_by_mlflow: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path) -> str:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(connection, "_dump_tables", fail)
    assert open_database(tmp_path / "first") == open_database(tmp_path / "second")
    assert len(made_by_mlflow) == 2
