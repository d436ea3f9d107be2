"""Units travel between two machines; what is killed half-way, damaged or changed on both sides is never mixed up."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.mirror import places
from firstlight.pipeline.data.mirror.bucket import Bucket, sum_bytes
from firstlight.pipeline.data.mirror.contents import CONTENTS_FILE
from firstlight.pipeline.data.mirror.mirror import Mirror
from firstlight.pipeline.records import DamagedRecord
from tests.support.buckets import make_mirror, open_elsewhere, write_files
from tests.support.gcs_server import BUCKET, serve_gcs

UNIT = "recipe/pretrain-seed0-abc"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    return make_mirror(tmp_path / "here", "mirrored", monkeypatch)


@pytest.fixture
def there(here: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    return open_elsewhere(tmp_path / "there", "mirrored", monkeypatch)


def read_files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def count_writes(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list to which the names of objects are added when they are written."""
    written: list[str] = []
    write, upload = Bucket.write, Bucket.upload
    monkeypatch.setattr(Bucket, "write", lambda self, name, data: (written.append(name), write(self, name, data))[1])
    monkeypatch.setattr(Bucket, "upload", lambda self, name, file: (written.append(name), upload(self, name, file))[1])
    return written


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Makes the `number`-th write from now on fail, and those after it, as if the process had been killed."""
    calls = [0]

    def wrap(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] >= number:
                raise OSError(5, "killed")
            return method(*arguments)

        return call

    for name in ("write", "upload", "delete"):
        monkeypatch.setattr(Bucket, name, wrap(getattr(Bucket, name)))


def test_unit_arrives_without_temporary_files_and_checkpoints(here: Mirror, there: Mirror) -> None:
    folder = write_files(here.root / UNIT, result__json="done", metrics__jsonl="1\n")
    write_files(folder / "encoder", manifest__json="{}", weights="w")
    write_files(folder / "checkpoints" / "step-000000001-ab", manifest__json="{}")
    write_files(folder, a__tmp="no", stop="no", **{"__lock": "no"})
    here.push(folder)
    assert there.fetch(there.root / UNIT)
    expected = {"result.json": "done", "metrics.jsonl": "1\n", "encoder/manifest.json": "{}", "encoder/weights": "w"}
    assert read_files(there.root / UNIT) == expected
    assert there.list_units(there.root) == [there.root / UNIT]
    assert not there.fetch(there.root / "recipe" / "other")


def test_record_is_written_last_and_nothing_is_sent_twice(
    here: Mirror, there: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = count_writes(here, monkeypatch)
    folder = write_files(here.root / UNIT, a="1", result__json="r")
    here.push(folder)
    assert written == [f"{UNIT}/{name}" for name in ("a", "result.json", CONTENTS_FILE)]
    here.push(folder)
    there.fetch(there.root / UNIT)
    there.push(there.root / UNIT)
    assert len(written) == 3
    (folder / "b").write_text("2")
    here.push(folder)
    assert written[3:] == [f"{UNIT}/b", f"{UNIT}/{CONTENTS_FILE}"]


def test_newer_version_wins_and_removed_files_go(here: Mirror, there: Mirror) -> None:
    folder, other = write_files(here.root / UNIT, log="1", old="x"), there.root / UNIT
    here.push(folder)
    there.fetch(other)
    (other / "log").write_text("1 2")
    (other / "old").unlink()
    there.push(other)
    # The log has changed on both sides since: the one there was made from what this machine had.
    (folder / "log").write_text("1 x")
    assert here.fetch(folder)
    assert (folder / "log").read_text() == "1 2"
    assert f"{UNIT}/old" not in here.bucket.list_names()
    # The files of this machine stay and are sent if there is no news from elsewhere.
    (folder / "log").write_text("1 2 3")
    here.fetch(folder)
    here.push(folder)
    there.fetch(other)
    assert (other / "log").read_text() == "1 2 3"


def test_files_of_two_machines_stay(here: Mirror, there: Mirror) -> None:
    folder, other = write_files(here.root / UNIT, a="1"), there.root / UNIT
    here.push(folder)
    there.fetch(other)
    write_files(other, b="2")
    there.push(other)
    write_files(folder, c="3")
    here.push(folder)
    there.fetch(other)
    assert read_files(other) == {"a": "1", "b": "2", "c": "3"}


@pytest.mark.fault(57, "killed while a unit was uploaded for the first time")
@pytest.mark.parametrize("writes", [1, 2, 3])
def test_half_uploaded_unit_does_not_exist(
    here: Mirror, there: Mirror, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(here.root / UNIT, a="1", result__json="r")
    with monkeypatch.context() as patch:
        fail_at(patch, writes)
        with pytest.raises(OSError, match="killed"):
            here.push(folder)
    assert not there.fetch(there.root / UNIT)
    assert not (there.root / UNIT).exists()
    here.push(folder)
    assert there.fetch(there.root / UNIT)


@pytest.mark.fault(57, "killed while a unit was uploaded again")
@pytest.mark.parametrize("writes", range(1, 6))
def test_unit_is_whole_at_every_moment_of_a_second_upload(
    here: Mirror, there: Mirror, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(here.root / UNIT, log="old", gone="x", result__json="r")
    here.push(folder)
    (folder / "gone").unlink()
    write_files(folder, log="new, longer", added="y")
    with monkeypatch.context() as patch:
        # both sums, the new file, the replaced file, the record, the removal
        fail_at(patch, writes)
        with pytest.raises(OSError, match="killed"):
            here.push(folder)
    assert there.fetch(there.root / UNIT)
    found = read_files(there.root / UNIT)
    assert found["result.json"] == "r"
    assert found["log"] in ("old", "new, longer")
    here.fetch(folder)
    assert read_files(folder) == {"log": "new, longer", "added": "y", "result.json": "r"} | (
        {"gone": "x"} if writes < 5 else {}
    ), "what is here is newer"
    here.push(folder)
    there.fetch(there.root / UNIT)
    assert read_files(there.root / UNIT)["log"] == "new, longer"


@pytest.mark.fault(58, "a changed byte in an object")
def test_damaged_object_is_not_taken_and_sent_again(here: Mirror, there: Mirror) -> None:
    folder, other = write_files(here.root / UNIT, a="one", b="two"), there.root / UNIT
    here.push(folder)
    here.bucket.write(f"{UNIT}/b", b"tw0")
    with pytest.raises(DamagedRecord, match=rf"^memory://mirrored/runs/{UNIT}/b: is damaged: it has 3 bytes, or other"):
        there.fetch(other)
    assert not other.exists(), "nothing of it is taken"
    # The work is done again, with the same bytes.
    write_files(other, a="one", b="two")
    there.push(other)
    assert here.bucket.read(f"{UNIT}/b") == b"two"
    here.bucket.delete([f"{UNIT}/a"])
    third = other.with_name("pretrain-seed0-copy")
    with pytest.raises(DamagedRecord, match=r"/a: is damaged: it is missing"):
        there.fetch_file(other.parent / "x" / "a", sum_bytes(b"one"))
    assert not third.exists()


@pytest.mark.fault(58, "a changed byte in a file of a stage")
@pytest.mark.parametrize("damaged", ["encoder/weights", "result.json"])
def test_logs_of_a_damaged_unit_are_salvaged(here: Mirror, there: Mirror, damaged: str) -> None:
    folder = write_files(here.root / UNIT, result__json="{}", published__json="{}", metrics__jsonl="1\n")
    write_files(folder / "encoder", weights="w")
    here.push(folder)
    here.bucket.write(f"{UNIT}/{damaged}", b"?")
    with pytest.raises(DamagedRecord, match=f"{damaged}: is damaged"):
        there.fetch(there.root / UNIT, salvages=True)
    expected = {"metrics.jsonl": "1\n", "encoder/weights": "w"}
    expected.pop(damaged, None)
    assert read_files(there.root / UNIT) == expected


@pytest.mark.fault(58, "a changed byte in a record")
def test_damaged_record_is_not_taken_and_written_anew(here: Mirror, there: Mirror) -> None:
    folder, other = write_files(here.root / UNIT, a="one"), there.root / UNIT
    here.push(folder)
    data = here.bucket.read(f"{UNIT}/{CONTENTS_FILE}")
    assert data is not None
    here.bucket.write(f"{UNIT}/{CONTENTS_FILE}", data.replace(b'"bytes": 3', b'"bytes": 4'))
    with pytest.raises(DamagedRecord, match="differs from its sum"):
        there.fetch(other)
    write_files(other, a="two")
    there.push(other)
    assert here.fetch(folder)
    assert (folder / "a").read_text() == "two"


def test_single_file_is_fetched_once_by_its_sum(here: Mirror, there: Mirror) -> None:
    folder = write_files(here.root / "stores" / "digits-1", shard="pixels")
    here.push(folder)
    file = there.root / "stores" / "digits-1" / "shard"
    there.fetch_file(file, sum_bytes(b"pixels"))
    assert file.read_text() == "pixels"
    here.bucket.delete(["stores/digits-1/shard"])
    there.fetch_file(file, sum_bytes(b"pixels"))
    with pytest.raises(DamagedRecord, match="is missing"):
        there.fetch_file(file.with_name("other"), sum_bytes(b"x"))


def test_lost_working_files_are_fetched_again(here: Mirror) -> None:
    folder = write_files(here.root / UNIT, a="1", b="2")
    here.push(folder)
    (folder / "a").unlink()
    assert here.fetch(folder)
    assert read_files(folder) == {"a": "1", "b": "2"}


def test_some_files_of_a_unit_are_enough(here: Mirror, there: Mirror) -> None:
    here.push(write_files(here.root / UNIT, mlflow__json="id", large="..."))
    other = there.root / UNIT
    there.fetch(other, ("mlflow.json",))
    assert read_files(other) == {"mlflow.json": "id"}
    # Nothing is lost by an upload of the rest.
    write_files(other, more="m")
    there.push(other)
    assert {f"{UNIT}/large", f"{UNIT}/more"} <= {*here.bucket.list_names()}
    there.fetch(other)
    assert read_files(other) == {"mlflow.json": "id", "large": "...", "more": "m"}


def test_unit_and_file_are_removed(here: Mirror, there: Mirror) -> None:
    folder = write_files(here.root / UNIT, a="1", b="2")
    step = write_files(folder / "checkpoints" / "step-000000001-ab", x="x")
    here.push(folder)
    here.seal(step, {"x": here.send_file(step, "x")})
    here.remove_file(folder / "a")
    assert there.fetch(there.root / UNIT)
    assert read_files(there.root / UNIT) == {"b": "2"}
    here.remove(folder)
    assert here.bucket.list_names() == []
    here.push(folder)
    assert f"{UNIT}/a" in here.bucket.list_names(), "what is here can be uploaded again"


def test_units_that_are_gone_are_forgotten(here: Mirror) -> None:
    folder = write_files(here.root / UNIT, a="1")
    here.push(folder)
    here.bucket.delete(here.bucket.list_names())
    here.push(folder)
    assert here.bucket.list_names() == [], "as far as it knows, all is there"
    here.forget_units(here.root / "recipe", here.list_units(here.root / "recipe"))
    here.push(folder)
    assert here.bucket.list_names() == [f"{UNIT}/a", f"{UNIT}/{CONTENTS_FILE}"]


def test_failed_uploads_rest(here: Mirror) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise OSError(5, "no connection")

    assert here.attempt(fail) == "no connection"
    assert here.attempt(fail) == "no connection"
    assert len(calls) == 1, "the second was not tried"
    assert here.attempt(lambda: calls.append(2), force=True) is None
    assert here.attempt(lambda: calls.append(3)) is None
    assert calls == [1, 2, 3]


def test_one_file_is_downloaded_once_by_many_threads(
    here: Mirror, there: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.push(write_files(here.root / "stores" / "s", shard="pixels"))
    file, downloads, download = there.root / "stores" / "s" / "shard", list[str](), Bucket.download
    monkeypatch.setattr(
        Bucket, "download", lambda self, name, to: (downloads.append(name), download(self, name, to))[1]
    )
    threads = [threading.Thread(target=there.fetch_file, args=(file, sum_bytes(b"pixels"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == ["stores/s/shard"]
    assert not list((there.root / ".mirror" / "staging").iterdir())
    assert os.listdir(file.parent) == ["shard"]


def open_in_google(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setenv(places.CACHE_VARIABLE, str(cache))
    mirror = places.find_mirror(places.place_storage(f"gs://{BUCKET}/runs"))
    assert mirror is not None
    return mirror


def test_unit_travels_by_google_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_gcs(tmp_path / "cache") as server:
        here, there, other = (open_in_google(tmp_path / name, monkeypatch) for name in ("here", "there", "other"))
        folder = write_files(here.root / UNIT, a="one", result__json="r")
        with monkeypatch.context() as patch:
            fail_at(patch, 2)
            with pytest.raises(OSError, match="killed"):
                here.push(folder)
        assert here.bucket.list_names() == [f"{UNIT}/a"]
        assert not there.fetch(there.root / UNIT), "without its record it does not exist"

        here.push(folder)
        objects = server.storage.objects[BUCKET]
        assert max(objects, key=lambda name: int(objects[name]["generation"])) == f"runs/{UNIT}/{CONTENTS_FILE}"
        assert there.list_units(there.root) == [there.root / UNIT]
        assert there.fetch(there.root / UNIT)
        assert read_files(there.root / UNIT) == {"a": "one", "result.json": "r"}

        here.bucket.write(f"{UNIT}/a", b"0ne")
        with pytest.raises(DamagedRecord, match=rf"^gs://{BUCKET}/runs/{UNIT}/a: is damaged: it has 3 bytes, or other"):
            other.fetch(other.root / UNIT)
        assert not (other.root / UNIT).exists()
        other.push(write_files(other.root / UNIT, a="new", result__json="r"))
        assert there.fetch(there.root / UNIT)
        assert read_files(there.root / UNIT) == {"a": "new", "result.json": "r"}
        there.remove(there.root / UNIT)
        assert there.bucket.list_names() == []
