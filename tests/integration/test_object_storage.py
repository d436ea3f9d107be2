"""A whole recipe with `storage` in a bucket: what is there afterwards, and machines that start with nothing."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.mirror import mirror as mirror_module
from firstlight.pipeline.data.mirror.places import find_mirror
from firstlight.pipeline.data.sources import remote_files
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import mirroring
from firstlight.pipeline.run.mirroring import NotUploaded
from firstlight.pipeline.run.runner import RecipeRun, RecipeRunner, run_recipe
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.checkpoint import Checkpoints
from tests.support import recipes
from tests.support.cluster_scale import scale
from tests.support.gcs_server import serve_gcs
from tests.support.machines_apart import start_machines_apart
from tests.support.object_server import ObjectServer, serve_objects
from tests.support.recipe_runs import runs_of
from tests.support.state_hash import hash_state

pytestmark = pytest.mark.usefixtures("undrawn_figures")
URI = "s3://bucket/runs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with serve_objects(tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def run(recipe: Recipe) -> tuple[RecipeRun, str]:
    text = io.StringIO()
    return run_recipe(recipe, Console(file=text, width=400)), text.getvalue()


def forget(recipe: Recipe) -> None:
    """Removes the working folder, as on another machine."""
    shutil.rmtree(recipe.storage)


def list_objects(recipe: Recipe) -> list[str]:
    mirror = find_mirror(recipe.storage)
    assert mirror is not None
    return mirror.bucket.list_names()


def pretraining(name: str, database: str, uri: str = URI, **changes: Any) -> Recipe:
    recipe = recipes.recipe(uri, name=name, tracking__uri=database, **changes)  # type: ignore[arg-type]
    del recipe.stages["evaluate"], recipe.stages["finetune"]
    return recipe


def end_state(recipe: Recipe) -> str:
    (folder,) = (recipe.storage / recipe.name).glob("pretrain-seed0-*")
    found, _ = Checkpoints(folder / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards])


@dataclass(frozen=True)
class Finished:
    """A pretraining that nothing has disturbed, in the bucket."""

    recipe: Recipe
    run_id: str
    end_state: str
    losses: list[tuple[int, float]]


@pytest.fixture(scope="module")
def whole(undrawn_figures: None, server: ObjectServer, database: str) -> Finished:
    recipe = pretraining("whole", database)
    ran, _ = run(recipe)
    return Finished(recipe, str(ran.run_id), end_state(recipe), read_losses(recipe))


def test_a_machine_with_an_empty_cache_finds_all_stages_finished(server: ObjectServer, database: str) -> None:
    recipe = recipes.recipe(URI, tracking__uri=database, **recipes.QUICK)  # type: ignore[arg-type]
    first, _ = run(recipe)
    names = list_objects(recipe)
    kinds = ("pretrain-seed0", "evaluate-seed0", "finetune-seed0")
    for kind in kinds:
        (result,) = [n for n in names if n.startswith(f"small/{kind}") and n.count("/") == 2 and "/result" in n]
        folder = result.removesuffix("result.json")
        assert {f"{folder}{file}" for file in ("contents.json", "mlflow.json", "published.json")} <= {*names}
    assert {"small/report.html", "small/contents.json", "small/recipes/contents.json"} <= {*names}
    assert sum(name.startswith("stores/digits-") and name.endswith("/manifest.json") for name in names) == 1
    assert not [name for name in names if Path(name).name.startswith(".") or name.endswith(".tmp")]
    # The newest two checkpoints are kept, as on disk.
    steps = {Path(name).parts[-2] for name in names if "/checkpoints/" in name and name.startswith("small/pretrain")}
    assert len(steps) == 2
    known = runs_of(recipe).keys()

    forget(recipe)
    again, text = run(recipe)

    assert again.rows == first.rows
    assert text.count("finished before, unchanged") == 3
    assert "nothing was run" in text
    assert again.run_id == first.run_id
    assert runs_of(recipe).keys() == known
    assert list_objects(recipe) == names


def test_google_s_storage_has_all_that_an_empty_machine_needs(tmp_path: Path, database: str) -> None:
    with serve_gcs(tmp_path / "cache"):
        recipe = pretraining("google", database, "gs://bucket/runs")
        run(recipe)
        expected, names = end_state(recipe), list_objects(recipe)
        assert sum(name.startswith("stores/digits-") and name.endswith("/manifest.json") for name in names) == 1
        forget(recipe)
        _, text = run(recipe)
        assert "nothing was run" in text
        assert list_objects(recipe) == names
        assert end_state(recipe) == expected


def test_killed_training_continues_bit_equal_on_an_empty_machine(
    server: ObjectServer, database: str, whole: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pretraining("killed", database)
    monkeypatch.setenv(failures.FAULT_VARIABLE, "rank=0,step=4,kind=raise")
    with pytest.raises(RuntimeError, match="injected fault"):
        run(recipe)
    monkeypatch.delenv(failures.FAULT_VARIABLE)
    forget(recipe)
    run(recipe)

    (folder,) = (recipe.storage / recipe.name).glob("pretrain-seed0-*")
    notes = [row["note"] for row in map(json.loads, (folder / "metrics.jsonl").open()) if "note" in row]
    assert any(note.startswith("continued from the checkpoint of step 3 ") for note in notes), notes
    assert (end_state(recipe), read_losses(recipe)) == (whole.end_state, whole.losses)


def read_losses(recipe: Recipe) -> list[tuple[int, float]]:
    (folder,) = (recipe.storage / recipe.name).glob("pretrain-seed0-*")
    rows = map(json.loads, (folder / "metrics.jsonl").open())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture
def impatient_client(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the client of the bucket try once to connect. By itself, it would try for six seconds, for each file."""
    once = AwsStandardS3RetryStrategy(max_attempts=1)
    host = server.environment["AWS_ENDPOINT_URL"].removeprefix("http://")
    client = S3FileSystem(endpoint_override=host, scheme="http", region="us-east-1", retry_strategy=once)
    monkeypatch.setattr(remote_files, "_open_pyarrow_filesystem", lambda uri: client)
    remote_files._connect_client.cache_clear()
    yield
    remote_files._connect_client.cache_clear()


@pytest.mark.fault(59, "no connection from the first stage on")
def test_work_goes_on_without_the_bucket_and_is_uploaded_later(
    server: ObjectServer, database: str, impatient_client: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pretraining("outage", database)
    monkeypatch.setattr(remote_files, "READ_ATTEMPTS", 1)
    monkeypatch.setattr(mirror_module, "REST_S", 600.0)
    monkeypatch.setattr(mirroring, "FLUSH_TIMEOUT_S", 0.0)
    run_stage = RecipeRunner.run_stage

    def lose_connection(runner: RecipeRunner, name: str) -> None:
        server.stop()
        run_stage(runner, name)

    text = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(RecipeRunner, "run_stage", lose_connection)
        with pytest.raises(NotUploaded, match=r"^storage: 's3://bucket/runs' cannot be written: \d folders ") as lost:
            run_recipe(recipe, Console(file=text, width=400))
    assert text.getvalue().count("the work goes on, its files are kept in ") == 1
    assert "pretrain-seed0-" in str(lost.value)
    assert "\n" not in str(lost.value)
    server.start()
    mirror = find_mirror(recipe.storage)
    assert mirror is not None
    assert not [unit for unit in mirror.list_units(recipe.storage / "outage") if "pretrain" in unit.name]

    again, text_again = run(recipe)
    assert "nothing was run" in text_again
    forget(recipe)
    last, text_last = run(recipe)
    assert text_last.count("finished before, unchanged") == 1
    assert last.run_id == again.run_id


@pytest.mark.fault(60, "a bucket that does not exist")
def test_missing_bucket_ends_the_command_before_any_work(server: ObjectServer, database: str) -> None:
    recipe = recipes.recipe("s3://none/runs", tracking__uri=database)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^storage: 's3://none/runs' cannot be written: the bucket does not ex"):
        run(recipe)
    assert not recipe.storage.exists()


@pytest.mark.fault(58, "a changed byte in a result and in a shard of a store")
def test_damaged_objects_are_made_again(server: ObjectServer, whole: Finished) -> None:
    recipe = whole.recipe
    names = list_objects(recipe)
    (result,) = [name for name in names if name.startswith("whole/pretrain-") and name.endswith("/result.json")]
    shard = next(name for name in names if name.endswith(".parquet") and "/train-" in name)
    for name in (result, shard):
        server.flip_byte(f"runs/{name}")
    forget(recipe)
    again, text = run(recipe)
    for name in (result, shard):
        assert f"s3://bucket/runs/{name}: is damaged: " in text
    assert "finished before" not in text
    assert end_state(recipe) == whole.end_state
    assert again.run_id == whole.run_id
    forget(recipe)
    _, text = run(recipe)
    assert text.count("finished before, unchanged") == 1, "what was damaged was written again"


@pytest.mark.ray
def test_machines_that_share_no_files_train_together(
    server: ObjectServer, database: str, tmp_path: Path, ray_free: None
) -> None:
    """The driver has no worker: all that it knows of the training it has from the bucket."""
    caches = [tmp_path / "one", tmp_path / "two"]
    with start_machines_apart(caches, server.environment) as address:
        recipe = pretraining("apart", database, **scale(address, 2))
        ran, text = run(recipe)
        (folder,) = (recipe.storage / "apart").glob("pretrain-seed0-*")
        result = json.loads((folder / "result.json").read_text())
        assert (folder / "published.json").exists()
        machine = json.loads((folder / "attempts.jsonl").read_text().splitlines()[0])["machine"]
        assert machine["workers"] == 2
        assert not list(folder.glob("checkpoints/*")), "the driver needs none"
        for number, cache in enumerate(caches):
            (other,) = cache.glob(f"*/apart/{folder.name}")
            written = {file.name for file in other.glob("checkpoints/*/*")}
            assert len([name for name in written if name.startswith("shard-")]) == 1, (number, written)
            assert list(cache.glob("*/stores/*/train-*.parquet"))
        assert read_losses(recipe)
        forget(recipe)
        again, text = run(recipe)
    assert text.count("finished before, unchanged") == 1
    assert again.run_id == ran.run_id
    assert json.loads((folder / "result.json").read_text()) == result
