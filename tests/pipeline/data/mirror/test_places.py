"""A storage is a folder or a URI; a path in a working folder has the same name on every machine."""

import pickle
from pathlib import Path

import pytest

from firstlight.pipeline.data.mirror import places
from firstlight.pipeline.data.mirror.places import (
    TravellingPath,
    find_mirror,
    find_place,
    find_unit,
    name_location,
    place_storage,
)
from firstlight.pipeline.errors import UserError
from tests.support.buckets import make_mirror, open_elsewhere, write_files


def test_folder_is_its_own_place(tmp_path: Path) -> None:
    assert place_storage("runs") == Path("runs")
    assert place_storage(f"file://{tmp_path}") == tmp_path
    assert find_mirror(tmp_path) is None
    assert name_location(tmp_path) == str(tmp_path)
    assert find_place(str(tmp_path)) == tmp_path
    assert places.fetch_unit(tmp_path) == []


def test_uri_has_one_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "cache"))
    root = place_storage("s3://bucket/a//b/")
    assert root == place_storage("s3://bucket/a/b")
    assert root.parent == tmp_path / "cache"
    assert not root.exists()
    assert name_location(root) == "s3://bucket/a/b"
    assert name_location(root / "x" / "y") == "s3://bucket/a/b/x/y"
    assert find_place("s3://bucket/a/b/x/y") == root / "x" / "y"
    assert place_storage("s3://bucket-a/b") != place_storage("s3://bucket/a-b")
    assert len({place_storage(f"s3://bucket/{'long' * 50}/{number}") for number in range(3)}) == 3


@pytest.mark.parametrize(("kept", "parent"), [("", "cache/firstlight/storage"), ("relative", "relative")])
def test_working_folders_are_in_the_users_cache_or_where_the_variable_says(
    kept: str, parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(places.CACHE_VARIABLE, kept)
    assert place_storage("gs://bucket/x").parent == tmp_path / parent
    monkeypatch.delenv(places.CACHE_VARIABLE)
    assert place_storage("gs://bucket/x").parent == tmp_path / "cache" / "firstlight" / "storage"


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("https://host/x", "'https://host/x' cannot be written; valid: a folder, s3://bucket/prefix, gs://"),
        ("ftp://c/x", "'ftp://c/x' cannot be written; valid: a folder"),
        ("az://", "is no bucket with a prefix; valid: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"),
        ("s3://", "is no bucket with a prefix; valid: s3://bucket/prefix"),
        ("s3://key:secret@bucket/x", "credentials are those of the environment"),
        ("s3://bucket/x?endpoint_override=y", "is no bucket with a prefix"),
        ("s3://bucket/../x", "is no bucket with a prefix"),
    ],
)
def test_locations_that_cannot_be_written_are_refused(location: str, problem: str) -> None:
    with pytest.raises(ValueError) as raised:
        place_storage(location)
    assert problem in str(raised.value)


def test_units_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_mirror(tmp_path, "units", monkeypatch).root
    step = "finetune-seed0-a/arm/checkpoints/step-000000004-0123abcd"
    for path, unit in {
        "stores/digits-1/train-00000.parquet": "stores/digits-1",
        "recipe": "recipe",
        "recipe/pretrain-seed0-a/encoder": "recipe/pretrain-seed0-a",
        f"recipe/{step}/manifest.json": f"recipe/{step}",
    }.items():
        assert find_unit(root / path) == root / unit
    assert find_unit(tmp_path / "elsewhere" / "a" / "b") == tmp_path / "elsewhere" / "a" / "b"


def test_path_is_found_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_mirror(tmp_path / "here", "travels", monkeypatch)
    here.push(write_files(here.root / "recipe" / "stage", weights="w"))
    sent = pickle.dumps(TravellingPath(here.root / "recipe" / "stage" / "weights"))
    lost = pickle.dumps(TravellingPath(here.root / "recipe" / "other" / "weights"))
    local = pickle.dumps(TravellingPath(tmp_path / "x"))

    there = open_elsewhere(tmp_path / "there", "travels", monkeypatch)
    found = pickle.loads(sent).fetch()
    assert found == there.root / "recipe" / "stage" / "weights"
    assert found.read_text() == "w"
    assert pickle.loads(local).fetch() == tmp_path / "x"
    # Its reader says that it is missing.
    assert not pickle.loads(lost).fetch().exists()
    there.bucket.write("recipe/stage/weights", b"v")
    found.unlink()
    with pytest.raises(UserError, match=r"^memory://travels/runs/recipe/stage/weights: is damaged"):
        pickle.loads(sent).fetch()
    found.write_text("w")
    assert pickle.loads(sent).fetch().read_text() == "w", "what is here has to do"


def test_damaged_unit_is_reported_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_mirror(tmp_path / "here", "told", monkeypatch)
    folder = write_files(here.root / "stores" / "digits-1", shard="pixels")
    here.push(folder)
    assert places.fetch_unit(folder) == []
    here.bucket.write("stores/digits-1/shard", b"pixelz")
    (folder / "shard").unlink()
    (line,) = places.fetch_unit(folder)
    assert line.startswith("memory://told/runs/stores/digits-1/shard: is damaged: ")
    assert line.endswith("; it is treated as missing, and made again")


def test_outage_names_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_mirror(tmp_path / "here", "out", monkeypatch)

    def fail(name: str) -> None:
        raise OSError(5, "no connection")

    monkeypatch.setattr(here.bucket, "read", fail)
    with pytest.raises(UserError, match=r"^storage: 'memory://out/runs' cannot be read: no connection; run it again"):
        places.fetch_unit(here.root / "stores" / "x")
