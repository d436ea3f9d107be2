"""A server of Google Cloud Storage in a thread: gcp-storage-emulator, and what it lacks of the real one.

It wants a token, which it gives for the key of its service account, and it refuses a range behind the end of an object.
"""

import contextlib
import functools
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

import pytest

from firstlight.pipeline.data.mirror import places
from firstlight.pipeline.data.sources import remote_files
from tests.support.json_answers import answer_json

BUCKET, TOKEN = "bucket", "token-of-the-service-account"
# The text of Google's error about a request without a token
ANONYMOUS = "Anonymous caller does not have storage access to the Google Cloud Storage object."


class GcsServer(ThreadingHTTPServer):
    """A server with one empty bucket. `requests` are those that it has answered: the method, the path and the range."""

    # Many threads ask at once
    request_queue_size = 128

    def __init__(self) -> None:
        from gcp_storage_emulator.handlers.buckets import create_bucket

        # It logs every object that is missing
        logging.getLogger("gcp_storage_emulator.storage").setLevel(logging.CRITICAL)
        self.storage = _make_storage()
        create_bucket(BUCKET, self.storage)
        self.requests: list[tuple[str, str, str]] = []
        super().__init__(("127.0.0.1", 0), functools.partial(_make_handler(), self.storage))

    def handle_error(self, *_: Any) -> None:
        """Says nothing: the client drops requests whose answers it does not need any more."""


def _make_storage() -> Any:
    from gcp_storage_emulator.storage import Storage

    class MemoryStorage(Storage):
        def _write_config_to_file(self) -> None:
            """Writes nothing, as another thread may change what it would write."""

    return MemoryStorage(use_memory_fs=True)


def _make_handler() -> type:
    from gcp_storage_emulator.server import RequestHandler

    class Handler(RequestHandler):
        server: GcsServer

        def log_message(self, *_: Any) -> None:
            """Logs nothing."""

        def parse_request(self) -> bool:
            if not super().parse_request():
                return False
            if self.path == "/token":
                self.rfile.read(int(self.headers["Content-Length"]))
                answer_json(self, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
                return False
            self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer_json(self, {"error": {"code": 401, "message": ANONYMOUS}}, 401)
                return False
            if self._is_behind_the_end():
                answer_json(self, {"error": {"code": 416, "message": "The requested range cannot be satisfied."}}, 416)
                return False
            return True

        def _is_behind_the_end(self) -> bool:
            wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            found = re.search(r"/b/([^/]+)/o/([^/]+)\Z", urlsplit(self.path).path)
            if not wanted or not found:
                return False
            facts = self.storage.objects.get(found[1], {}).get(unquote(found[2]))
            return facts is not None and int(wanted[1]) >= int(facts["size"])

    return Handler


@functools.cache
def _make_private_key() -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*kinds).decode()


@contextlib.contextmanager
def serve_gcs(cache: Path, has_credentials: bool = True) -> Iterator[GcsServer]:
    """Runs a server for the block, with working folders below `cache`, and a key in the environment."""
    for name in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[dev]'")
    server = GcsServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    key = cache / "key.json"
    cache.mkdir(parents=True, exist_ok=True)
    facts = {"type": "service_account", "project_id": "project", "private_key": _make_private_key()}
    key.write_text(json.dumps({**facts, "client_email": "it@project", "token_uri": f"{address}/token"}))
    # The client would look for the folder of gcloud without a key, and for the server that a machine of Google has.
    credentials = {"GOOGLE_APPLICATION_CREDENTIALS": str(key)} if has_credentials else {"NO_GCE_CHECK": "true"}
    environment = {"STORAGE_EMULATOR_HOST": address, "CLOUDSDK_CONFIG": str(cache), **credentials}
    with mock.patch.dict(os.environ, {**environment, places.CACHE_VARIABLE: str(cache)}), _tell_kind_of_bucket():
        if not has_credentials:
            os.environ.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
        _forget_clients()
        try:
            yield server
        finally:
            _forget_clients()
            server.shutdown()
            server.server_close()


def _tell_kind_of_bucket() -> contextlib.AbstractContextManager[Any]:
    """Answers in place of the service that knows the kind of a bucket, which is another one, asked by gRPC over TLS."""
    from gcsfs import extended_gcsfs

    async def find_kind(*_: Any) -> Any:
        return extended_gcsfs.BucketType.NON_HIERARCHICAL

    return mock.patch.object(extended_gcsfs.ExtendedGcsFileSystem, "_get_bucket_type", find_kind)


def _forget_clients() -> None:
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    remote_files._connect_client.cache_clear()
