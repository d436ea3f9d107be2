"""Roots that are URIs: a bucket (in memory), a web server, and the client of pyarrow."""

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
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem

from firstlight.pipeline.data.sources import Source, files, open_source, remote_files
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.errors import UserError
from tests.support import image_sources
from tests.support.blob_server import serve_blobs
from tests.support.gcs_server import serve_gcs
from tests.support.image_sources import dataset_options, list_labels, make_png, prepare_store, read_split
from tests.support.webdataset_shards import make_samples, write_shard


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(remote_files.time, "sleep", lambda seconds: None)
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/b", recursive=True)


def upload_folder(bucket: Any, folder: Path, top: str = "/b/set") -> None:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        bucket.pipe_file(f"{top}/{file.relative_to(folder)}", file.read_bytes())


def open_on_disk_and_in_bucket(source: str, folder: Path, bucket: Any, **fields: Any) -> tuple[Source, Source]:
    """Opens a source on disk, and the same in the bucket; the latter is pickled, as it is for a task."""
    upload_folder(bucket, folder)
    local, remote = (
        open_source(dataset_options(source=source, root=root, **fields)) for root in (folder, "memory://b/set/")
    )
    return local, pickle.loads(pickle.dumps(remote))


def have_same_content(local: Source, remote: Source) -> bool:
    splits = local.splits == remote.splits and local.classes == remote.classes
    return splits and all(read_split(local, split) == read_split(remote, split) for split in local.splits)


@pytest.mark.parametrize("source", ["folder", "parquet", "webdataset"])
def test_missing_root_is_named(bucket: Any, source: str) -> None:
    bucket.pipe_file("/b/other/x.txt", b"")
    for root in ("memory://b/none", "memory://b/other"):
        with pytest.raises(UserError, match=rf"^dataset\.root: .*{root}.*") as caught:
            open_source(dataset_options(source=source, root=root))
        assert len(str(caught.value).splitlines()) == 1


def test_folder_in_bucket_equals_disk(tmp_path: Path, bucket: Any) -> None:
    names = ["cat/z/1.PNG", "dog/é 2.png", "cat/x.txt", ".h/4.png", "cat/.5.png"]
    image_sources.write_named_files(tmp_path, *(f"train/{name}" for name in names), "val/dog/3.png", "meta/x.png")
    assert have_same_content(*open_on_disk_and_in_bucket("folder", tmp_path, bucket))
    bucket.rm("/b/set", recursive=True)
    assert have_same_content(*open_on_disk_and_in_bucket("folder", tmp_path / "train", bucket, test_fraction=0.5))


def test_unlabelled_folder_in_bucket_equals_disk(tmp_path: Path, bucket: Any) -> None:
    assert have_same_content(
        *open_on_disk_and_in_bucket("folder", image_sources.write_named_files(tmp_path, "1.png", "a/2.png"), bucket)
    )


def test_parquet_in_bucket_equals_disk(tmp_path: Path, bucket: Any) -> None:
    for name in ("train-0", "train-1", "test-0"):
        image_sources.write_image_table(
            tmp_path / f"{name}.parquet", [f"{name} {k}".encode() for k in range(9)], [k % 3 for k in range(9)]
        )
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert have_same_content(*open_on_disk_and_in_bucket("parquet", tmp_path, bucket))


def test_webdataset_in_bucket_equals_disk(tmp_path: Path, bucket: Any) -> None:
    write_shard(tmp_path / "train-0.tar", *make_samples("a0", "b1"))
    write_shard(tmp_path / "train-1.tar.gz", *make_samples("c2", "d1"))
    write_shard(tmp_path / "val-0.tar", *make_samples("e0"))
    assert have_same_content(*open_on_disk_and_in_bucket("webdataset", tmp_path, bucket))
    named = open_source(dataset_options(source="webdataset", root="memory://b/set/train-{0..1}.tar*"))
    assert list_labels(named) == [
        ("train-0.tar/a0.jpg", 0),
        ("train-0.tar/b1.jpg", 1),
        ("train-1.tar.gz/c2.jpg", 2),
        ("train-1.tar.gz/d1.jpg", 1),
    ]


def test_list_in_bucket_names_paths_and_uris(tmp_path: Path, bucket: Any) -> None:
    image_sources.write_named_files(tmp_path, "1.jpg", "sub/2.jpg").joinpath("x.csv").write_text(
        "path,label\n1.jpg,a\nsub/2.jpg,b\n../out.jpg,a\nnone.jpg,a\nmemory://b/other.jpg,b\n"
    )
    upload_folder(bucket, tmp_path)
    bucket.pipe_file("/b/other.jpg", b"other")
    in_list_folder = open_source(dataset_options(source="list", list="memory://b/set/x.csv"))
    assert [(record.data, record.reason) for record in read_split(in_list_folder)] == [
        (b"1.jpg", None),
        (b"sub/2.jpg", None),
        (None, "path leaves the root"),
        (None, "No such file or directory"),
        (b"other", None),
    ]
    below = open_source(dataset_options(source="list", list=tmp_path / "x.csv", root="memory://b/set"))
    assert read_split(below) == read_split(in_list_folder)
    with pytest.raises(
        UserError, match=r"^dataset\.list: memory://b/set/none\.csv: cannot be read: No such file or directory$"
    ):
        open_source(dataset_options(source="list", list="memory://b/set/none.csv"))


def test_too_large_file_is_not_fetched(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, remote_files):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 100)
    bucket.pipe_file("/b/set/fits", bytes(100))
    bucket.pipe_file("/b/set/large", bytes(10_000))
    fetched: list[int] = []
    real = type(bucket).cat_file
    monkeypatch.setattr(
        type(bucket), "cat_file", lambda *args, **named: (data := real(*args, **named), fetched.append(len(data)))[0]
    )
    assert RemoteFiles("memory://b/set").read(b"fits") == bytes(100)
    with pytest.raises(OSError, match=r"^has 10000 bytes \(at most 100\)$"):
        RemoteFiles("memory://b/set").read(b"large")
    assert fetched == [100]


@pytest.mark.parametrize("source", ["folder", "parquet", "webdataset", "list"])
def test_fingerprint_changes_when_bucket_is_rewritten(tmp_path: Path, bucket: Any, source: str) -> None:
    image_sources.write_named_files(tmp_path, "1.png").joinpath("x.csv").write_text("path\n1.png\n")
    image_sources.write_image_table(tmp_path / "x.parquet", [b"a"], [0])
    write_shard(tmp_path / "x.tar", *make_samples("a0"))
    upload_folder(bucket, tmp_path)
    fields = {
        "source": source,
        "root": "memory://b/set",
        "label_column": None,
        **({"list": "memory://b/set/x.csv"} if source == "list" else {}),
    }
    before = [open_source(dataset_options(**fields)).fingerprint for _ in range(2)]
    upload_folder(bucket, tmp_path)  # the same files, written again
    assert len({*before, open_source(dataset_options(**fields)).fingerprint}) == 2


def test_failed_read_is_repeated(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe_file("/b/x.jpg", b"x")
    calls: list[str] = []

    def shaky(path: str, **options: Any) -> bytes:
        calls.append(path)
        if len(calls) % 3:
            raise RuntimeError("reset by\npeer")
        return b"x"

    monkeypatch.setattr(type(bucket), "cat_file", lambda self, path, **options: shaky(path))
    assert RemoteFiles("memory://b").read(b"x.jpg") == b"x"
    monkeypatch.setattr(remote_files, "READ_ATTEMPTS", 2)
    with pytest.raises(OSError, match="RuntimeError: reset by peer"):
        RemoteFiles("memory://b").read(b"x.jpg")


def test_bucket_is_prepared_as_store(tmp_path: Path, bucket: Any) -> None:
    for k in range(10):
        bucket.pipe_file(f"/b/set/{'odd' if k % 2 else 'even'}/{k}.png", make_png(k))
    bucket.pipe_file("/b/set/odd/bad.png", b"no image")
    store = prepare_store(dataset_options(source="folder", root="memory://b/set", test_fraction=0.2), tmp_path)
    assert (store.classes, store.quarantined, store.splits) == (
        ("even", "odd"),
        1,
        {"train": 8, "test": 2},
    )


def test_web_server_is_read_as_folder(tmp_path: Path) -> None:
    image_sources.write_named_files(tmp_path, "cat/1.png", "dog/2 é.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        source = open_source(dataset_options(source="folder", root=root))
        assert (source.classes, [record.data for record in read_split(source)]) == (
            ("cat", "dog"),
            [b"cat/1.png", "dog/2 é.png".encode()],
        )
        before = source.fingerprint
        os.utime(tmp_path / "cat" / "1.png", (1, 1))
        assert open_source(dataset_options(source="folder", root=root)).fingerprint != before
        server.shutdown()


@pytest.mark.parametrize("source", ["folder", "parquet"])
@pytest.mark.parametrize("top", ["az://container", "gs://bucket"])
def test_bucket_of_azure_and_of_google_equals_disk(tmp_path: Path, top: str, source: str) -> None:
    folder = tmp_path / "set"
    if source == "folder":
        image_sources.write_named_files(folder, "train/cat/1.png", "train/dog/é 2.png", "val/dog/3.png", ".h/4.png")
    else:
        for name in ("train-0", "test-0"):
            image_sources.write_image_table(
                folder / f"{name}.parquet", [f"{name} {k}".encode() for k in range(9)], [k % 3 for k in range(9)]
            )
    with (serve_blobs if top.startswith("az") else serve_gcs)(tmp_path / "cache"):
        client, container = remote_files.find_client(top)
        upload_folder(client, folder, f"{container}/set")
        local = open_source(dataset_options(source=source, root=folder))
        remote = open_source(dataset_options(source=source, root=f"{top}/set/"))
        assert have_same_content(local, pickle.loads(pickle.dumps(remote)))
        before = remote.fingerprint
        name = "val/dog/3.png" if source == "folder" else "test-0.parquet"
        data = client.cat_file(f"{container}/set/{name}")
        client.pipe_file(f"{container}/set/{name}", data)
        assert open_source(dataset_options(source=source, root=f"{top}/set")).fingerprint != before
        with pytest.raises(UserError, match=rf"^dataset\.root: .*{top}/none"):
            open_source(dataset_options(source=source, root=f"{top}/none"))


def test_images_of_google_are_ranges_of_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, remote_files):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 100)
    with serve_gcs(tmp_path / "cache") as server:
        client = remote_files.find_client("gs://bucket")[0]
        for name, size in {"fits": 100, "large": 10_000, "empty": 0, "é 2#1%20?.png": 3}.items():
            client.pipe_file(f"bucket/set/{name}", bytes(range(100)) * 100 if size > 100 else bytes(size))
        # A folder that was made in the console is an object without a byte.
        client.pipe_file("bucket/set/folder/", b"")
        remote = RemoteFiles("gs://bucket/set")
        server.requests.clear()
        assert remote.read(b"fits") == bytes(100)
        with pytest.raises(OSError, match=r"^has 101 bytes \(at most 100\)$"):
            remote.read(b"large")
        assert remote.read(b"empty") == b""
        assert remote.read_part(b"large", 205, 7) == bytes(range(5, 12))
        assert (remote.read_part(b"empty", 0, 16), remote.read_part(b"large", 10_000, 7)) == (b"", b"")
        assert [wanted for _, _, wanted in server.requests[:4]] == ["bytes=0-100"] * 3 + ["bytes=205-211"]
        assert remote.read("é 2#1%20?.png".encode()) == bytes(3)
        assert remote.list_tree() == ["empty", "fits", "large", "é 2#1%20?.png"] == remote.list_names()
        assert [remote.exists(name) for name in ("fits", "none")] == [True, False]
        with remote.open("large") as file:
            file.seek(205)
            assert file.read(7) == bytes(range(5, 12))
        with pytest.raises(FileNotFoundError, match=r"gs://bucket/set/none"):
            remote.read(b"none")


def test_version_in_google_is_that_of_the_content(tmp_path: Path) -> None:
    with serve_gcs(tmp_path / "cache"):
        client = remote_files.find_client("gs://bucket")[0]
        client.pipe_file("bucket/set/x.png", b"x")
        remote = RemoteFiles("gs://bucket/set")
        before = remote.get_facts("x.png")
        assert remote.list_all() == [before]
        client.setxattrs("bucket/set/x.png", content_type="image/png")
        assert remote.get_facts("x.png") == before
        client.pipe_file("bucket/set/x.png", b"x")
        assert remote.get_facts("x.png") != before


@pytest.mark.parametrize(("root", "extra"), [("az://container/set", "azure"), ("hf://datasets/owner/set", "hf")])
def test_missing_client_is_named_with_its_extra(root: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str, **options: Any) -> Any:
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    remote_files._connect_client.cache_clear()
    with pytest.raises(OSError, match=rf"needs an extra: pip install 'firstlight\[{extra}\]'"):
        RemoteFiles(root).list_names()
    remote_files._connect_client.cache_clear()


def test_pyarrow_client_is_used_if_fsspec_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str, **options: Any) -> Any:
        raise ImportError(scheme)

    image_sources.write_named_files(tmp_path / "bucket", "set/cat/1.png", "set/dog/2.png")
    asked: list[str] = []
    disk = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setattr(remote_files, "_open_pyarrow_filesystem", lambda uri: asked.append(uri) or disk)
    remote_files._connect_client.cache_clear()
    source = open_source(dataset_options(source="folder", root="s3://bucket/set"))
    assert [(record.path, record.data) for record in read_split(source)] == [
        ("cat/1.png", b"set/cat/1.png"),
        ("dog/2.png", b"set/dog/2.png"),
    ]
    assert asked == ["s3://bucket"]
    remote_files._connect_client.cache_clear()


def test_pyarrow_client_of_google_does_not_wait_for_long() -> None:
    fs = remote_files._open_pyarrow_filesystem("gs://bucket")
    assert fs.type_name == "gcs"
    assert fs == FileSystem.from_uri(f"gs://bucket?retry_limit_seconds={remote_files.PYARROW_RETRY_S}")[0]
    assert fs != FileSystem.from_uri("gs://bucket")[0]
