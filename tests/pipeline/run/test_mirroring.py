"""Uploads of a run wait during an outage; workers find what they read, and the driver what they have made."""

import json
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.mirror.bucket import Bucket
from firstlight.pipeline.data.mirror.mirror import Mirror
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.run import mirroring
from firstlight.pipeline.run.mirroring import (
    NotUploaded,
    RunMirror,
    check_bucket,
    check_results,
    fetch_shared_work,
    find_fetched,
    share_folders,
    upload_results,
)
from firstlight.pipeline.stages.stage import StageInstance
from tests.support import recipes
from tests.support.buckets import make_mirror, open_elsewhere, write_files
from tests.support.object_server import serve_objects


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setattr(mirroring, "FLUSH_TIMEOUT_S", 0.0)
    monkeypatch.setattr(mirroring, "FLUSH_POLL_S", 0.01)
    return make_mirror(tmp_path / "here", "runs", monkeypatch)


def refuse(*arguments: Any) -> Any:
    raise OSError(5, "no connection")


def made(run: Path) -> None:
    write_files(run, report__html="report")
    write_files(run / "recipes", ab__json="{}")
    write_files(run / "inputs" / "ab", weights="w")
    write_files(run / "pretrain-seed0-ab", result__json="{}")


def test_run_is_downloaded_without_checkpoints_and_inputs(
    here: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    run = here.root / "small"
    made(run)
    step = write_files(run / "pretrain-seed0-ab" / "checkpoints" / "step-000000001-ab", x="x")
    here.seal(step, {"x": here.send_file(step, "x")})
    RunMirror(run, told.append).put_run()
    there = open_elsewhere(tmp_path / "there", "runs", monkeypatch)
    other = there.root / "small"
    RunMirror(other, told.append).fetch_run()
    files = {path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file()}
    assert files == {"report.html", "recipes/ab.json", "pretrain-seed0-ab/result.json"}
    there.bucket.write("small/recipes/ab.json", b"[]")
    (other / "recipes" / "ab.json").unlink()
    RunMirror(other, told.append).fetch_run()
    assert [line.partition(":")[0] for line in told] == ["memory"]
    assert told[0].endswith("; it is treated as missing, and made again")


@pytest.mark.fault(59, "uploads during an outage")
def test_uploads_wait_and_are_repeated(here: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    run = here.root / "small"
    made(run)
    uploads = RunMirror(run, told.append)
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "read", refuse)
        uploads.put(run / "pretrain-seed0-ab")
        uploads.put(run / "recipes")
        assert told == [
            "storage: 'memory://runs/runs' cannot be written (no connection): the work goes on, its files are kept in "
            f"{here.root} and uploaded later"
        ]
        with pytest.raises(NotUploaded) as raised:
            uploads.flush(["row"])
        assert raised.value.rows == ("row",)
        assert str(raised.value) == (
            f"storage: 'memory://runs/runs' cannot be written: 2 folders are in {here.root} and not uploaded "
            "(small/pretrain-seed0-ab, small/recipes); run the same command on this machine again to upload them"
        )
    uploads.flush()
    assert told[1:] == ["storage: 'memory://runs/runs' is reachable again, and has all that was waiting"]
    assert here.has_unit(run / "recipes")


def test_folder_is_no_bucket(tmp_path: Path) -> None:
    made(tmp_path / "small")
    uploads = RunMirror(tmp_path / "small", lambda line: pytest.fail(line))
    uploads.fetch_run()
    uploads.put_run()
    uploads.flush()
    upload_results(tmp_path / "small" / "pretrain-seed0-ab")
    fetch_shared_work(tmp_path / "small")
    assert uploads.waiting == {}
    assert find_fetched(str(tmp_path / "x")) == tmp_path / "x"


@pytest.mark.fault(60, "no connection, no bucket, and a bucket that loses what is written")
def test_bucket_is_checked_with_one_line(here: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_bucket(here)
    assert here.bucket.list_names() == []
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "read", lambda self, name: None)
        with pytest.raises(UserError, match=r"^storage: 'memory://runs/runs' does not return what was written; valid:"):
            check_bucket(here)
    monkeypatch.setattr(Bucket, "write", refuse)
    with pytest.raises(UserError, match=r"^storage: 'memory://runs/runs' cannot be written: no connection; valid: a "):
        check_bucket(here)
    monkeypatch.undo()
    with (
        serve_objects(tmp_path / "cache"),
        pytest.raises(UserError, match=r"^storage: 's3://none/runs' cannot be written: the bucket does not exist; va"),
    ):
        check_bucket(Mirror(tmp_path, "s3://none/runs"))


def instance_in(run: Path, **changes: Any) -> StageInstance:
    return StageInstance("pretrain", 0, "ab", run / "pretrain-seed0-ab", **changes)


def test_cluster_shares_what_workers_read_and_make(
    here: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring, "FOLLOW_S", 0.01)
    run = here.root / "small"
    encoder = write_files(run / "inputs" / "ab", weights="w")
    instance = instance_in(run, encoder=encoder)
    write_files(instance.folder, mlflow__json="{}")
    storage: Any = "memory://runs/runs"
    recipe = recipes.recipe(storage, tracking__uri="http://x", scale__address="auto")
    with share_folders(recipe, [instance]):
        there = open_elsewhere(tmp_path / "there", "runs", monkeypatch)
        found = find_fetched("memory://runs/runs/small/inputs/ab")
        assert found == there.root / "small" / "inputs" / "ab"
        assert (found / "weights").read_text() == "w"
        folder = there.root / "small" / "pretrain-seed0-ab"
        there.fetch(folder)
        write_files(folder, metrics__jsonl='{"step": 1}\n')
        upload_results(folder)
        with pytest.raises(StageFailed, match=r"^storage: 'memory://runs/runs' does not have what the workers made"):
            check_results([instance])
        write_files(there.root / "small" / "shared", cd__json=json.dumps({"folder": "pretrain-seed0-ab"}))
        write_sealed_json(folder / "result.json", {"images": 1})
        upload_results(folder)
    check_results([instance])
    assert (instance.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (run / "shared" / "cd.json").exists()


def test_worker_finds_the_work_of_other_stages(here: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here.root / "small"
    here.push(write_files(run / "finetune-seed0-ab", scores="s"))
    write_sealed_json(write_files(run / "shared") / "cd.json", {"folder": "finetune-seed0-ab/scratch"})
    here.push(run / "shared")
    there = open_elsewhere(tmp_path / "there", "runs", monkeypatch)
    fetch_shared_work(there.root / "small")
    assert (there.root / "small" / "finetune-seed0-ab" / "scores").read_text() == "s"


def test_local_files_are_used_during_an_outage(here: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(here.root / "stores" / "digits-1", manifest__json="{}")
    monkeypatch.setattr(Bucket, "read", refuse)
    assert find_fetched(here.get_location(folder)) == folder
    with pytest.raises(UserError, match=r"^storage: 'memory://runs/runs' cannot be read: no connection; run it again"):
        find_fetched("memory://runs/runs/stores/other")
