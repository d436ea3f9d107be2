"""A store is written while torch is imported, the recipe is checked and MLflow is opened; a mistake ends that."""

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.mirror.places import place_storage
from firstlight.pipeline.data.prepare import jobs, local_jobs
from firstlight.pipeline.data.prepare import prepare as module
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.pipeline.run.preparing import ahead as ahead_module
from firstlight.pipeline.run.preparing.ahead import write_ahead
from firstlight.pipeline.run.runner import run_recipe
from tests.support import recipes
from tests.support.folders_of_noise import write_noise_folder
from tests.support.undrawn_figures import leave_undrawn

QUIET = Console(quiet=True)
HEAVY = ("torch", "torchvision", "timm", "ray", "mlflow", "matplotlib", "scipy", "sklearn")
# Writes a whole store as a command begins to, and says what was imported until then.
ALONE = f"""
import sys
from pathlib import Path
from rich.console import Console
from firstlight.pipeline.cli.main import _load_checked_recipe
from firstlight.pipeline.run.preparing.ahead import write_ahead
recipe = _load_checked_recipe(Path(sys.argv[1]), (), False)
with write_ahead(recipe, Console(stderr=True), "prepare") as ahead:
    store = ahead.finish(ahead.side).store
    print(sum(store.splits.values()), *[name for name in {HEAVY} if name in sys.modules])
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_noise_folder(tmp_path / "images", {"a": 30, "b": 30}, (24, 24))
    return tmp_path / "images"


def folder_recipe(storage: Path, images: Path, **changes: Any) -> Recipe:
    """Returns a recipe of a pretraining on the images of a folder."""
    data = {**recipes.RECIPE["dataset"], "name": "noise", "source": "folder", "root": str(images)}
    data |= {"max_train": None, "max_test": None}
    stages = {"pretrain": {**recipes.RECIPE["stages"]["pretrain"], "batch_size": 16}}
    return recipes.recipe(storage, **{"dataset": data, "stages": stages, **changes})


def test_store_is_written_before_torch_and_mlflow_are_imported(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(folder_recipe(tmp_path / "runs", images).dump()))
    for _ in range(2):
        # The first process of a changed checkout reads the parameters of all methods.
        ran = subprocess.run([sys.executable, "-c", ALONE, str(file)], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "60\n", ran.stderr


def test_run_takes_the_store_that_is_written_ahead(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, written = folder_recipe(tmp_path, images), list[str]()
    write = module._write_store

    def note(*arguments: Any) -> Any:
        written.append(threading.current_thread().name)
        return write(*arguments)

    monkeypatch.setattr(module, "_write_store", note)
    with leave_undrawn(), write_ahead(recipe, QUIET, "prepare") as ahead:
        assert ahead is not None
        assert run_recipe(recipe, QUIET, "prepare", ahead=ahead).rows == []
        assert ahead.source is None
    assert written == ["store"]


def test_another_side_is_left_to_the_caller(tmp_path: Path, images: Path) -> None:
    with write_ahead(folder_recipe(tmp_path, images), QUIET, None) as ahead:
        assert ahead is not None
        assert ahead.finish(999) is None
        assert not ahead.thread.is_alive()


def test_mistake_of_the_images_is_raised_where_the_store_is_taken(tmp_path: Path, images: Path) -> None:
    for file in sorted((images / "a").iterdir())[:20]:
        file.write_bytes(file.read_bytes()[:40])
    recipe = folder_recipe(tmp_path / "runs", images)
    with write_ahead(recipe, QUIET, "prepare") as ahead:
        assert ahead is not None
        with pytest.raises(UserError, match=r"^dataset.max_bad_fraction: 0.1 is exceeded"):
            ahead.finish(find_recipe_side(recipe))


@pytest.fixture
def slow_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many processes' worth of jobs, of which each image is reported, and takes long."""
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 20)
    monkeypatch.setattr(local_jobs, "BACKGROUND_IMAGES", 10)
    monkeypatch.setattr(jobs, "IMAGES_PER_REPORT", 1)
    decode = jobs.PartWriter._decode_image

    def decode_slowly(self: Any, record: Any) -> Any:
        time.sleep(0.2)
        return decode(self, record)

    monkeypatch.setattr(jobs.PartWriter, "_decode_image", decode_slowly)


@pytest.mark.usefixtures("slow_writing")
def test_unusable_mlflow_ends_the_writing_in_one_line(tmp_path: Path, images: Path) -> None:
    recipe = folder_recipe(tmp_path / "runs", images, tracking__uri="http://127.0.0.1:9", scale__cpus=1)
    with (
        pytest.raises(UserError, match=r"^tracking.uri: 'http://127.0.0.1:9' cannot be used: [^\n]*$"),
        write_ahead(recipe, QUIET, "prepare") as ahead,
    ):
        run_recipe(recipe, QUIET, "prepare", ahead=ahead)
    assert ahead is not None
    assert not ahead.thread.is_alive()
    assert isinstance(ahead.error, ahead_module._Abandoned)
    assert not list((tmp_path / "runs" / "stores").rglob(MANIFEST_FILE))


def test_other_processes_end_with_a_mistake(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 20)
    monkeypatch.setattr(local_jobs, "BACKGROUND_IMAGES", 10)
    found: list[subprocess.Popen[bytes]] = []
    start = local_jobs.start_module
    monkeypatch.setattr(local_jobs, "start_module", lambda name: found.append(start(name)) or found[-1])
    recipe = folder_recipe(tmp_path / "runs", images, scale__cpus=3)

    def fail_beside_them() -> None:
        end = time.monotonic() + 60
        while len(found) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        raise UserError("x: wrong")

    with pytest.raises(UserError, match=r"^x: wrong$"), write_ahead(recipe, QUIET, None):
        fail_beside_them()
    assert not psutil.wait_procs([psutil.Process(one.pid) for one in found if one.poll() is None], timeout=30)[1]


def test_running_recipe_is_not_begun_twice(tmp_path: Path, images: Path) -> None:
    recipe = folder_recipe(tmp_path / "runs", images)
    with (
        write_ahead(recipe, QUIET, None),
        pytest.raises(UserError, match=r"^name: 'small' is being run by process"),
        write_ahead(recipe, QUIET, None),
    ):
        pytest.fail("it was begun")


@pytest.mark.parametrize(
    "changes",
    [{"scale__address": "ray://head:10001"}, {"dataset__extends": "noise-0"}, {"bucket": "memory://jobs/runs"}],
)
def test_other_places_write_when_they_are_known(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("FIRSTLIGHT_STORAGE_CACHE", str(tmp_path))
    bucket = changes.pop("bucket", None)
    recipe = folder_recipe(tmp_path / "runs", images, **changes)
    if bucket:
        recipe = recipe.model_copy(update={"storage": place_storage(bucket)})
    with write_ahead(recipe, QUIET, None) as ahead:
        assert ahead is None


def test_kind_without_a_stage_is_a_mistake(tmp_path: Path, images: Path) -> None:
    recipe = folder_recipe(tmp_path / "runs", images)
    with pytest.raises(UserError, match="has no stage of the kind embed; "), write_ahead(recipe, QUIET, "embed"):
        pytest.fail("it was begun")
    assert not (tmp_path / "runs").exists()


def test_progress_begins_with_what_was_read(tmp_path: Path, images: Path) -> None:
    out = io.StringIO()
    recipe = folder_recipe(tmp_path / "runs", images)
    with write_ahead(recipe, Console(file=out, width=200), None) as ahead:
        assert ahead is not None
        ahead.finish(ahead.side)
    lines = out.getvalue().splitlines()
    assert lines[0] == "  read 60 files, left out 0"
    assert lines[-1].startswith("prepare: 60 images in ")


def test_folder_as_tracking_uri_is_a_mistake_before_anything_is_written(tmp_path: Path, images: Path) -> None:
    recipe = folder_recipe(tmp_path / "runs", images, tracking__uri=f"file://{tmp_path}/mlruns")
    with pytest.raises(UserError, match=r"^tracking.uri: 'file://.*' is not valid: "), write_ahead(recipe, QUIET, None):
        pytest.fail("it was begun")
    assert not (tmp_path / "runs").exists()
