"""Objects are written, read, listed and deleted; a failure is an OSError that names the URI."""

import contextlib
import hashlib
import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from firstlight.pipeline.data.mirror import bucket as bucket_module
from firstlight.pipeline.data.mirror.bucket import Bucket, sum_bytes, sum_file
from tests.support.blob_server import serve_blobs
from tests.support.gcs_server import serve_gcs
from tests.support.object_server import serve_objects


def serve(uri: str, cache: Path) -> contextlib.AbstractContextManager[Any]:
    servers: dict[str, Any] = {"az": serve_blobs, "gs": serve_gcs}
    return servers.get(uri.partition("://")[0], serve_objects)(cache)


@pytest.mark.parametrize(
    "uri", ["memory://bucket/objects", "s3://bucket/objects", "az://container/objects", "gs://bucket/objects"]
)
def test_objects_are_written_read_listed_and_deleted(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "CHUNK_BYTES", 5)
    with serve(uri, tmp_path):
        bucket = Bucket(uri)
        assert bucket.list_names() == []
        assert bucket.read("a/b") is None
        assert bucket.write("a/b", b"one") == sum_bytes(b"one")
        (tmp_path / "file").write_bytes(b"longer than a piece")
        expected = {"bytes": 19, "sha256": hashlib.sha256(b"longer than a piece").hexdigest()}
        assert bucket.upload("a/c/d", tmp_path / "file") == sum_file(tmp_path / "file") == expected
        assert bucket.list_names() == ["a/b", "a/c/d"]
        assert bucket.list_names("a/c") == ["a/c/d"]
        assert bucket.read("a/b") == b"one"
        assert bucket.download("a/c/d", tmp_path / "copy") == expected
        assert (tmp_path / "copy").read_bytes() == b"longer than a piece"
        bucket.delete(["a/b", "a/none"])
        assert bucket.list_names() == ["a/c/d"]
        with pytest.raises(FileNotFoundError):
            bucket.download("a/b", tmp_path / "copy")
        bucket.delete(["a/c/d"])


@pytest.mark.parametrize("scheme", ["s3", "az", "gs"])
def test_missing_bucket_is_no_missing_object(scheme: str, tmp_path: Path) -> None:
    with (
        serve(f"{scheme}://none", tmp_path),
        pytest.raises(OSError, match=rf"(the bucket does not exist|ContainerNotFound).*{scheme}://none/x/a'"),
    ):
        Bucket(f"{scheme}://none/x").write("a", b"x")


class BrokenFile(io.BytesIO):
    """A file that cannot be read to its end."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise OSError(5, "the disk is broken")
        return data


@pytest.mark.parametrize("size", [100, 6 << 20], ids=["before anything is sent", "after a part is sent"])
@pytest.mark.parametrize("uri", ["az://container/objects", "gs://bucket/objects"])
def test_interrupted_upload_makes_no_object_and_replaces_none(uri: str, size: int, tmp_path: Path) -> None:
    file: Any = SimpleNamespace(open=lambda mode: BrokenFile(bytes(size)))
    with serve(uri, tmp_path):
        bucket = Bucket(uri)
        bucket.write("old", b"as it was")
        for name in ("old", "new"):
            with pytest.raises(OSError, match="the disk is broken"):
                bucket.upload(name, file)
        assert bucket.list_names() == ["old"]
        assert bucket.read("old") == b"as it was"


def test_large_object_is_sent_to_google_in_parts(tmp_path: Path) -> None:
    data = bytes(range(256)) * (6 << 12)
    (tmp_path / "file").write_bytes(data)
    with serve_gcs(tmp_path / "cache") as server:
        bucket = Bucket("gs://bucket/objects")
        assert bucket.upload("large", tmp_path / "file") == sum_bytes(data)
        sent = [path for method, path, _ in server.requests if method == "POST" and "upload_id=" in path]
        assert len(sent) == 2
        assert bucket.download("large", tmp_path / "copy") == sum_bytes(data)


def test_missing_credentials_of_google_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("gcsfs"), "handle", logged.append)
    with serve_gcs(tmp_path, has_credentials=False), pytest.raises(OSError) as caught:
        Bucket("gs://bucket/objects").write("a", b"x")
    assert caught.value.filename == "gs://bucket/objects/a"
    assert "Anonymous caller does not have storage access" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not logged, "no stack trace is logged besides"
