"""Published sets from a server on this machine: whole, or a line that names the URL; and nothing twice."""

import functools
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torchvision.datasets.utils

from firstlight.pipeline.data.sources import download, open_source
from firstlight.pipeline.data.sources.download import WORK, Remote, Set, fetch, published
from firstlight.pipeline.errors import UserError
from tests.pipeline.data.sources.published.test_voc import voc
from tests.support.tiny import dataset


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`folder` at `url`; `asked`: the paths that were."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{serving.server_port}", asked=asked)
        serving.shutdown()


def served(server: SimpleNamespace, name: str, content: bytes) -> Remote:
    (server.folder / name).write_bytes(content)
    return Remote((f"{server.url}/{name}",), hashlib.md5(content).hexdigest())


def tar(folder: Path, *names: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in names:
            archive.add(folder / name, name)
    return file.getvalue()


@pytest.fixture
def devkit(server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Remote, Remote]:
    """VOC 2007 in two archives of one folder, as it is published."""
    voc(tmp_path / "made/VOCdevkit/VOC2007", trainval="000000\n000001\n", test="000002\n")
    names = [
        file.relative_to(tmp_path / "made").as_posix() for file in (tmp_path / "made").rglob("*") if file.is_file()
    ]
    halves = (
        [name for name in names if "test" not in name and "000002" not in name],
        [name for name in names if "test" in name or "000002" in name],
    )
    files = tuple(served(server, f"{k}.tar.gz", tar(tmp_path / "made", *half)) for k, half in enumerate(halves))
    monkeypatch.setattr(download, "published", lambda dataset: Set(files, "VOCdevkit/VOC2007", "JPEGImages"))
    return files[0], files[1]


def settings(root: Path, **fields: Any) -> Any:
    return dataset(**{"name": "voc2007", "source": "voc", "root": root, "download": True, **fields})


def test_a_set_is_fetched_once(devkit: tuple[Remote, Remote], server: SimpleNamespace, tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    source = open_source(settings(root))
    assert source.splits == {"train": 2, "test": 1}
    assert sorted(file.name for file in root.iterdir()) == ["VOCdevkit"]
    asked = len(server.asked)
    for where in (root, root / "VOCdevkit", root / "VOCdevkit/VOC2007"):  # as the source finds it
        assert open_source(settings(where)).splits == source.splits
    assert len(server.asked) == asked
    (root / "VOCdevkit/VOC2007").rename(root / "VOCdevkit/VOC2012")
    fetch(settings(root))  # another year beside it
    assert sorted(file.name for file in (root / "VOCdevkit").iterdir()) == ["VOC2007", "VOC2012"]


def refused(root: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        open_source(settings(root, **fields))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_another_file_than_the_published(
    devkit: tuple[Remote, Remote], server: SimpleNamespace, tmp_path: Path
) -> None:
    root, whole = tmp_path / "root", (server.folder / "1.tar.gz").read_bytes()
    for content in (whole[:-1], b"", b"<html>moved</html>"):
        (server.folder / "1.tar.gz").write_bytes(content)
        told = refused(root)
        assert told.startswith(
            f"dataset.download: {server.url}/1.tar.gz: what came is not the published file, whose md5 is {devkit[1].md5}; "
        )
        assert not (root / "VOCdevkit").exists()
    (server.folder / "1.tar.gz").write_bytes(whole)
    server.asked.clear()
    fetch(settings(root))
    assert {path for path in server.asked if "GET" not in path} == {"/1.tar.gz"}  # the other one was whole
    (server.folder / "1.tar.gz").unlink()
    assert f"{server.url}/1.tar.gz: File not found; " in refused(tmp_path / "other")


def test_a_fetch_that_is_stopped_is_no_set(
    devkit: tuple[Remote, Remote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, extract, left = tmp_path / "root", torchvision.datasets.utils.extract_archive, [1]

    def stopping(*args: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        extract(*args)

    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", stopping)
    with pytest.raises(KeyboardInterrupt):
        fetch(settings(root))
    assert not (root / "VOCdevkit").exists()
    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", extract)
    assert open_source(settings(root)).splits == {"train": 2, "test": 1}
    assert not (root / WORK).exists()


def test_files_that_are_not_packed(server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first mirror has none of them, and one of them is there, unpacked by its owner."""
    files = [served(server, name, name.encode()) for name in ("a.gz", "b.gz")]
    files = [Remote((f"{server.url}/gone/{file.name}", *file.urls), file.md5) for file in files]
    monkeypatch.setattr(download, "published", lambda dataset: Set(tuple(files), None))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_text("mine")
    fetch(settings(tmp_path / "root"))
    assert {file.name: file.read_text() for file in (tmp_path / "root").iterdir()} == {"a": "mine", "b.gz": "b.gz"}


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT", 1)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        for listens in (False, True):  # refused, or no answer
            deaf.listen() if listens else None
            file = Remote((f"http://127.0.0.1:{port}/x.tar.gz",), "0" * 32)
            monkeypatch.setattr(download, "published", lambda dataset, file=file: Set((file,), "x"))
            start = time.monotonic()
            told = refused(tmp_path)
            assert time.monotonic() - start < 8
            assert told.startswith(
                f"dataset.download: http://127.0.0.1:{port}/x.tar.gz: {'timed out' if listens else 'Connection refused'}"
            )
            assert told.endswith("; valid: a network that leads there, or false, with the set unpacked in dataset.root")


@pytest.mark.parametrize(
    ("name", "source", "files"),
    [
        ("cifar10_binary", "cifar10", 1),
        ("cifar100", "cifar100", 1),
        ("stl10", "stl10", 1),
        ("svhn", "svhn", 2),
        ("mnist", "idx", 4),
        ("voc2007", "voc", 2),
        ("voc2012", "voc", 1),
    ],
)
def test_the_published_sets(name: str, source: str, files: int) -> None:
    found = published(dataset(name=name, source=source, root="/data"))
    assert len(found.files) == files
    for file in found.files:
        assert all(url.startswith(("https://", "http://")) and url.endswith(file.name) for url in file.urls)
        assert len(bytes.fromhex(file.md5)) == 16


@pytest.mark.parametrize(
    ("name", "source"), [("photos", "folder"), ("bccd", "voc"), ("voc2007", "folder"), ("fashion", "idx")]
)
def test_a_set_that_is_not_known(tmp_path: Path, name: str, source: str) -> None:
    told = refused(tmp_path, name=name, source=source)
    assert told.startswith(f"dataset.download: is not known for dataset.name {name!r} with source {source!r}; ")
    assert "cifar10, cifar100, mnist, stl10, svhn, voc2007, voc2012" in told


def test_a_root_that_is_not_on_disk() -> None:
    with pytest.raises(
        UserError, match=r"dataset\.download: true is not valid with dataset\.root 's3://x/y'; valid: a folder on disk"
    ):
        open_source(settings("s3://x/y"))  # type: ignore[arg-type]
