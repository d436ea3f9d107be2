"""An S3 server in a thread of this process, for tests of storages in a bucket; it can be stopped and started again.

Processes that tests start find it by the environment.
"""

import contextlib
import functools
import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from firstlight.pipeline.data.mirror import places
from firstlight.pipeline.data.sources import remote_files

BUCKET = "bucket"
REASON = "moto[server] is not installed: pip install -e '.[dev]'"


class ObjectServer:
    """A server with one empty bucket. `environment` is what clients need."""

    def __init__(self) -> None:
        server = pytest.importorskip("moto.server", reason=REASON)
        # A line of every request is of no use.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        _list_services_once()
        self._make = server.ThreadedMotoServer
        self.port = 0
        self._server: Any = None
        self.start()
        # The objects of an earlier server are kept in this process.
        self._request("POST", "moto-api/reset")
        self._request("PUT", BUCKET)

    def start(self) -> None:
        """Starts the server at the port that it had before. Its objects are those that it had."""
        self._server = self._make(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        """Stops the server: connections are refused."""
        self._server.stop()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def _request(self, method: str, path: str, data: bytes | None = None) -> bytes:
        url = f"http://127.0.0.1:{self.port}/{path}"
        # Otherwise the server would wait for the fields of a form.
        kind = {"Content-Type": "application/octet-stream"}
        with urllib.request.urlopen(urllib.request.Request(url, data, kind, method=method), timeout=60) as answer:
            return bytes(answer.read())

    def read(self, name: str) -> bytes:
        return self._request("GET", f"{BUCKET}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self._request("PUT", f"{BUCKET}/{name}", data)

    def delete(self, name: str) -> None:
        self._request("DELETE", f"{BUCKET}/{name}")

    def flip_byte(self, name: str) -> None:
        """Changes a byte in the middle of an object."""
        data = bytearray(self.read(name))
        data[len(data) // 2] ^= 0xFF
        self.write(name, bytes(data))


def _list_services_once() -> None:
    """Lets moto read the folder of its services once, and not for each request."""
    from moto import backends

    if not hasattr(backends.list_of_moto_modules, "cache_info"):
        names = tuple(backends.list_of_moto_modules())
        backends.list_of_moto_modules = functools.cache(lambda: names)


@contextlib.contextmanager
def serve_objects(cache: Path) -> Iterator[ObjectServer]:
    """Runs a server for the block, with working folders below `cache`."""
    server = ObjectServer()
    remote_files._connect_client.cache_clear()
    with mock.patch.dict(os.environ, {**server.environment, places.CACHE_VARIABLE: str(cache)}):
        try:
            yield server
        finally:
            with contextlib.suppress(Exception):
                server.stop()
            remote_files._connect_client.cache_clear()
