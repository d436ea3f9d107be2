"""Roots that are URIs: of this machine, of a bucket (here: one in memory), of a web server."""

import functools
import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from firstlight.pipeline.data.sources import Source, files, open_source
from firstlight.pipeline.data.sources.files import Remote, local_path
from firstlight.pipeline.errors import UserError
from tests.pipeline.data.sources.test_webdataset import samples, shard
from tests.support import tiny
from tests.support.tiny import dataset, everything, picture, prepared, summary


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/b", recursive=True)


def put(bucket: Any, folder: Path, top: str = "/b/set") -> None:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        bucket.pipe_file(f"{top}/{file.relative_to(folder)}", file.read_bytes())


def both(source: str, folder: Path, bucket: Any, **fields: Any) -> tuple[Source, Source]:
    """What is on disk, and the same in the bucket; pickled, as it is for a task."""
    put(bucket, folder)
    local, remote = (open_source(dataset(source=source, root=root, **fields)) for root in (folder, "memory://b/set/"))
    return local, pickle.loads(pickle.dumps(remote))


def same(local: Source, remote: Source) -> bool:
    splits = local.splits == remote.splits and local.classes == remote.classes
    return splits and all(everything(local, split) == everything(remote, split) for split in local.splits)


def test_what_a_root_may_be(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    assert local_path("a//b/../c") == Path.cwd() / "a" / "c"
    assert local_path("~/x") == Path.home() / "x"
    assert local_path((tmp_path / "a b").as_uri()) == tmp_path / "a b"
    assert {local_path(root) for root in ("s3://bucket/x", "gs://bucket/x", "https://host/x", "memory://x")} == {None}
    assert dataset(source="folder", root="s3://bucket//x").root == "s3://bucket//x"
    assert dataset(source="folder", root="~/x").root == str(Path.home() / "x")
    with pytest.raises(
        UserError,
        match=r"^dataset\.root: 'ftp://host/x': ftp:// is unknown; valid: a path, or file://, gs://, http://, ",
    ):
        open_source(dataset(source="folder", root="ftp://host/x"))


@pytest.mark.parametrize("source", ["folder", "parquet", "webdataset"])
def test_a_root_that_is_not_there(bucket: Any, source: str) -> None:
    bucket.pipe_file("/b/other/x.txt", b"")
    for root in ("memory://b/none", "memory://b/other"):
        with pytest.raises(UserError, match=rf"^dataset\.root: .*{root}.*") as caught:
            open_source(dataset(source=source, root=root))
        assert len(str(caught.value).splitlines()) == 1


def test_a_source_of_the_disk_refuses_a_bucket() -> None:
    from firstlight.pipeline.data.sources.source import local_root

    with pytest.raises(
        UserError,
        match=r"^dataset\.root: 's3://b/x' is not on this machine; dataset\.source 'svhn' takes a folder on disk",
    ):
        local_root(dataset(source="svhn", root="s3://b/x"))


def test_folder(tmp_path: Path, bucket: Any) -> None:
    names = ["cat/z/1.PNG", "dog/é 2.png", "cat/x.txt", ".h/4.png", "cat/.5.png"]
    tiny.files(tmp_path, *(f"train/{name}" for name in names), "val/dog/3.png", "meta/x.png")
    assert same(*both("folder", tmp_path, bucket))
    bucket.rm("/b/set", recursive=True)
    assert same(*both("folder", tmp_path / "train", bucket, test_fraction=0.5))


def test_folder_of_a_bucket_without_labels(tmp_path: Path, bucket: Any) -> None:
    assert same(*both("folder", tiny.files(tmp_path, "1.png", "a/2.png"), bucket))


def test_parquet(tmp_path: Path, bucket: Any) -> None:
    for name in ("train-0", "train-1", "test-0"):
        tiny.table(tmp_path / f"{name}.parquet", [f"{name} {k}".encode() for k in range(9)], [k % 3 for k in range(9)])
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert same(*both("parquet", tmp_path, bucket))


def test_webdataset(tmp_path: Path, bucket: Any) -> None:
    shard(tmp_path / "train-0.tar", *samples("a0", "b1"))
    shard(tmp_path / "train-1.tar.gz", *samples("c2", "d1"))
    shard(tmp_path / "val-0.tar", *samples("e0"))
    assert same(*both("webdataset", tmp_path, bucket))
    named = open_source(dataset(source="webdataset", root="memory://b/set/train-{0..1}.tar*"))
    assert summary(named) == [
        ("train-0.tar/a0.jpg", 0),
        ("train-0.tar/b1.jpg", 1),
        ("train-1.tar.gz/c2.jpg", 2),
        ("train-1.tar.gz/d1.jpg", 1),
    ]


def test_list(tmp_path: Path, bucket: Any) -> None:
    tiny.files(tmp_path, "1.jpg", "sub/2.jpg").joinpath("x.csv").write_text(
        "path,label\n1.jpg,a\nsub/2.jpg,b\n../out.jpg,a\nnone.jpg,a\nmemory://b/other.jpg,b\n"
    )
    put(bucket, tmp_path)
    bucket.pipe_file("/b/other.jpg", b"other")
    beside = open_source(dataset(source="list", list="memory://b/set/x.csv"))
    assert [(record.data, record.reason) for record in everything(beside)] == [
        (b"1.jpg", None),
        (b"sub/2.jpg", None),
        (None, "path leaves the root"),
        (None, "No such file or directory"),
        (b"other", None),
    ]
    below = open_source(dataset(source="list", list=tmp_path / "x.csv", root="memory://b/set"))
    assert everything(below) == everything(beside)
    with pytest.raises(
        UserError, match=r"^dataset\.list: memory://b/set/none\.csv: cannot be read: No such file or directory$"
    ):
        open_source(dataset(source="list", list="memory://b/set/none.csv"))


def test_what_is_too_large_is_not_fetched(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    bucket.pipe_file("/b/set/fits", bytes(100))
    bucket.pipe_file("/b/set/large", bytes(10_000))
    fetched: list[int] = []
    real = type(bucket).cat_file
    monkeypatch.setattr(
        type(bucket), "cat_file", lambda *args, **named: (data := real(*args, **named), fetched.append(len(data)))[0]
    )
    assert Remote("memory://b/set").read(b"fits") == bytes(100)
    with pytest.raises(OSError, match=r"^has 10000 bytes \(at most 100\)$"):
        Remote("memory://b/set").read(b"large")
    assert fetched == [100]


@pytest.mark.parametrize("source", ["folder", "parquet", "webdataset", "list"])
def test_the_fingerprint_follows_the_bucket(tmp_path: Path, bucket: Any, source: str) -> None:
    tiny.files(tmp_path, "1.png").joinpath("x.csv").write_text("path\n1.png\n")
    tiny.table(tmp_path / "x.parquet", [b"a"], [0])
    shard(tmp_path / "x.tar", *samples("a0"))
    put(bucket, tmp_path)
    fields = {
        "source": source,
        "root": "memory://b/set",
        "label_column": None,
        **({"list": "memory://b/set/x.csv"} if source == "list" else {}),
    }
    before = [open_source(dataset(**fields)).fingerprint for _ in range(2)]
    put(bucket, tmp_path)  # the same, written anew
    assert len({*before, open_source(dataset(**fields)).fingerprint}) == 2


def test_a_hiccup_is_no_bad_image(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe_file("/b/x.jpg", b"x")
    calls: list[str] = []

    def shaky(path: str, **options: Any) -> bytes:
        calls.append(path)
        if len(calls) % 3:
            raise RuntimeError("reset by\npeer")
        return b"x"

    monkeypatch.setattr(type(bucket), "cat_file", lambda self, path, **options: shaky(path))
    assert Remote("memory://b").read(b"x.jpg") == b"x"
    monkeypatch.setattr(files, "ATTEMPTS", 2)
    with pytest.raises(OSError, match="RuntimeError: reset by peer"):
        Remote("memory://b").read(b"x.jpg")


def test_a_bucket_becomes_a_store(tmp_path: Path, bucket: Any) -> None:
    for k in range(10):
        bucket.pipe_file(f"/b/set/{'odd' if k % 2 else 'even'}/{k}.png", picture(k))
    bucket.pipe_file("/b/set/odd/bad.png", b"no image")
    store = prepared(dataset(source="folder", root="memory://b/set", test_fraction=0.2), tmp_path)
    assert (store.classes, store.quarantined, store.splits) == (
        ("even", "odd"),
        1,
        {"train": 8, "test": 2},
    )


def test_a_web_server(tmp_path: Path) -> None:
    tiny.files(tmp_path, "cat/1.png", "dog/2 é.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        source = open_source(dataset(source="folder", root=root))
        assert (source.classes, [record.data for record in everything(source)]) == (
            ("cat", "dog"),
            [b"cat/1.png", "dog/2 é.png".encode()],
        )
        before = source.fingerprint
        os.utime(tmp_path / "cat" / "1.png", (1, 1))
        assert open_source(dataset(source="folder", root=root)).fingerprint != before
        server.shutdown()


def test_the_client_of_pyarrow_where_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str, **options: Any) -> Any:
        raise ImportError(scheme)

    tiny.files(tmp_path / "bucket", "set/cat/1.png", "set/dog/2.png")
    asked: list[str] = []
    disk = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setattr(files, "_of_pyarrow", lambda uri: asked.append(uri) or disk)
    files._connect.cache_clear()
    source = open_source(dataset(source="folder", root="s3://bucket/set"))
    assert [(record.path, record.data) for record in everything(source)] == [
        ("cat/1.png", b"set/cat/1.png"),
        ("dog/2.png", b"set/dog/2.png"),
    ]
    assert asked == ["s3://bucket"]
    files._connect.cache_clear()
