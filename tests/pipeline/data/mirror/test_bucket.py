"""Objects are written, read, listed and deleted; a failure is an OSError that names the URI."""

import hashlib
from pathlib import Path

import pytest

from firstlight.pipeline.data.mirror import bucket as bucket_module
from firstlight.pipeline.data.mirror.bucket import Bucket, sum_bytes, sum_file
from tests.support.blob_server import serve_blobs
from tests.support.object_server import serve_objects


@pytest.mark.parametrize("uri", ["memory://bucket/objects", "s3://bucket/objects", "az://container/objects"])
def test_objects_are_written_read_listed_and_deleted(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "CHUNK_BYTES", 5)
    with serve_blobs(tmp_path) if uri.startswith("az://") else serve_objects(tmp_path):
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


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_missing_bucket_is_no_missing_object(scheme: str, tmp_path: Path) -> None:
    with (
        serve_blobs(tmp_path) if scheme == "az" else serve_objects(tmp_path),
        pytest.raises(OSError, match=rf"(the bucket does not exist|ContainerNotFound).*{scheme}://none/x/a'"),
    ):
        Bucket(f"{scheme}://none/x").write("a", b"x")
