"""Downloads from a server on this machine.

A set is complete or the error names the URL, and nothing is downloaded twice.
"""

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

from firstlight.pipeline.data.sources import download, open_source
from firstlight.pipeline.data.sources.download import (
    DOWNLOAD_FOLDER,
    PUBLISHED_SETS,
    Download,
    PublishedSet,
    download_dataset,
    find_published_set,
)
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options
from tests.support.voc_folders import write_voc


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


def serve_file(server: SimpleNamespace, name: str, content: bytes) -> Download:
    (server.folder / name).write_bytes(content)
    return Download((f"{server.url}/{name}",), hashlib.md5(content).hexdigest())


def make_tar(folder: Path, *names: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in names:
            archive.add(folder / name, name)
    return file.getvalue()


@pytest.fixture
def devkit(server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Download, Download]:
    """VOC 2007 in two archives of one folder, as it is published."""
    write_voc(tmp_path / "made/VOCdevkit/VOC2007", trainval="000000\n000001\n", test="000002\n")
    names = [
        file.relative_to(tmp_path / "made").as_posix() for file in (tmp_path / "made").rglob("*") if file.is_file()
    ]
    halves = (
        [name for name in names if "test" not in name and "000002" not in name],
        [name for name in names if "test" in name or "000002" in name],
    )
    files = tuple(
        serve_file(server, f"{k}.tar.gz", make_tar(tmp_path / "made", *half)) for k, half in enumerate(halves)
    )
    monkeypatch.setattr(
        download, "find_published_set", lambda dataset: PublishedSet(files, "VOCdevkit/VOC2007", "JPEGImages")
    )
    return files[0], files[1]


def make_options(root: Path, **fields: Any) -> Any:
    return dataset_options(**{"name": "voc2007", "source": "voc", "root": root, "download": True, **fields})


def test_set_is_downloaded_once(devkit: tuple[Download, Download], server: SimpleNamespace, tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    source = open_source(make_options(root))
    assert source.splits == {"train": 2, "test": 1}
    assert sorted(file.name for file in root.iterdir()) == ["VOCdevkit"]
    asked = len(server.asked)
    for where in (root, root / "VOCdevkit", root / "VOCdevkit/VOC2007"):  # as the source finds it
        assert open_source(make_options(where)).splits == source.splits
    assert len(server.asked) == asked
    (root / "VOCdevkit/VOC2007").rename(root / "VOCdevkit/VOC2012")
    download_dataset(make_options(root))  # another year is in the folder
    assert sorted(file.name for file in (root / "VOCdevkit").iterdir()) == ["VOC2007", "VOC2012"]


def get_error(root: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        open_source(make_options(root, **fields))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_wrong_md5_names_url(devkit: tuple[Download, Download], server: SimpleNamespace, tmp_path: Path) -> None:
    root, whole = tmp_path / "root", (server.folder / "1.tar.gz").read_bytes()
    for content in (whole[:-1], b"", b"<html>moved</html>"):
        (server.folder / "1.tar.gz").write_bytes(content)
        error = get_error(root)
        assert error.startswith(f"dataset.download: {server.url}/1.tar.gz: the download is not the published file, ")
        assert f"whose md5 is {devkit[1].md5}; " in error
        assert not (root / "VOCdevkit").exists()
    (server.folder / "1.tar.gz").write_bytes(whole)
    server.asked.clear()
    download_dataset(make_options(root))
    # The other archive was complete
    assert {path for path in server.asked if "GET" not in path} == {"/1.tar.gz"}
    (server.folder / "1.tar.gz").unlink()
    assert f"{server.url}/1.tar.gz: File not found; " in get_error(tmp_path / "other")


def test_interrupted_download_leaves_no_set(
    devkit: tuple[Download, Download], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, open_archive, left = tmp_path / "root", tarfile.open, [1]

    def stop_at_second(*args: Any, **kwargs: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return open_archive(*args, **kwargs)

    monkeypatch.setattr(tarfile, "open", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        download_dataset(make_options(root))
    assert not (root / "VOCdevkit").exists()
    monkeypatch.setattr(tarfile, "open", open_archive)
    assert open_source(make_options(root)).splits == {"train": 2, "test": 1}
    assert not (root / DOWNLOAD_FOLDER).exists()


def test_plain_files_use_next_mirror_and_skip_existing(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first mirror has none of them, and one of them is there, unpacked by its owner."""
    files = [serve_file(server, name, name.encode()) for name in ("a.gz", "b.gz")]
    files = [Download((f"{server.url}/gone/{file.name}", *file.urls), file.md5) for file in files]
    monkeypatch.setattr(download, "find_published_set", lambda dataset: PublishedSet(tuple(files), None))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_text("mine")
    download_dataset(make_options(tmp_path / "root"))
    assert {file.name: file.read_text() for file in (tmp_path / "root").iterdir()} == {"a": "mine", "b.gz": "b.gz"}


def test_unreachable_server_fails_within_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 1)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        # The connection is refused, or accepted without an answer
        for listens in (False, True):
            deaf.listen() if listens else None
            file = Download((f"http://127.0.0.1:{port}/x.tar.gz",), "0" * 32)
            monkeypatch.setattr(download, "find_published_set", lambda dataset, file=file: PublishedSet((file,), "x"))
            start = time.monotonic()
            error = get_error(tmp_path)
            assert time.monotonic() - start < 8
            reason = "timed out" if listens else "Connection refused"
            assert error.startswith(f"dataset.download: http://127.0.0.1:{port}/x.tar.gz: {reason}")
            assert error.endswith("; valid: a network that reaches it, or false, with the set unpacked in dataset.root")


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
def test_published_sets_have_urls_and_md5(name: str, source: str, files: int) -> None:
    found = find_published_set(dataset_options(name=name, source=source, root="/data"))
    assert len(found.files) == files
    for file in found.files:
        assert all(url.startswith(("https://", "http://")) and url.endswith(file.name) for url in file.urls)
        assert len(bytes.fromhex(file.md5)) == 16


@pytest.mark.parametrize(
    ("name", "source"), [("photos", "folder"), ("bccd", "voc"), ("voc2007", "folder"), ("fashion", "idx")]
)
def test_unknown_set_lists_known_sets(tmp_path: Path, name: str, source: str) -> None:
    message = get_error(tmp_path, name=name, source=source)
    assert message.startswith(f"dataset.download: is not known for dataset.name {name!r} with source {source!r}; ")
    assert "cifar10, cifar100, mnist, stl10, svhn, voc2007, voc2012" in message


def test_remote_root_raises() -> None:
    with pytest.raises(
        UserError, match=r"dataset\.download: true is not valid with dataset\.root 's3://x/y'; valid: a folder on disk"
    ):
        open_source(make_options("s3://x/y"))  # type: ignore[arg-type]


def test_urls_and_md5_are_those_of_torchvision() -> None:
    from torchvision.datasets import MNIST, STL10, SVHN
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    def list_files(name: str) -> list[tuple[tuple[str, ...], str]]:
        return [tuple(file) for file in PUBLISHED_SETS[name].files]

    assert list_files("stl10") == [((STL10.url,), STL10.tgz_md5)]
    assert list_files("svhn") == [((SVHN.split_list[k][0],), SVHN.split_list[k][2]) for k in ("train", "test")]
    assert list_files("mnist") == [(tuple(top + name for top in MNIST.mirrors), md5) for name, md5 in MNIST.resources]
    for name, years in (("voc2007", ("2007", "2007-test")), ("voc2012", ("2012",))):
        assert list_files(name) == [((DATASET_YEAR_DICT[k]["url"],), DATASET_YEAR_DICT[k]["md5"]) for k in years]


def test_archive_member_cannot_leave_folder(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../escaped.txt"))
    file = serve_file(server, "x.tar.gz", content.getvalue())
    monkeypatch.setattr(download, "find_published_set", lambda dataset: PublishedSet((file,), "x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        download_dataset(make_options(tmp_path / "root"))
    assert not list(tmp_path.rglob("escaped.txt"))


def test_redirects_are_followed_and_circles_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/there":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"content")
                return
            self.send_response(302)
            self.send_header("Location", "/there" if self.path == "/a.gz" else "/circle.gz")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{serving.server_port}"
        for name in ("a.gz", "circle.gz"):
            file = Download((f"{url}/{name}",), hashlib.md5(b"content").hexdigest())
            monkeypatch.setattr(download, "find_published_set", lambda dataset, file=file: PublishedSet((file,), None))
            if name == "a.gz":
                download_dataset(make_options(tmp_path))
                assert (tmp_path / "a.gz").read_bytes() == b"content"
            else:
                assert f"dataset.download: {url}/circle.gz: " in get_error(tmp_path)
        serving.shutdown()
