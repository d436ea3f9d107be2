"""A server of blobs in a thread of this process: what the client of Azure (adlfs) asks for, of the protocol of Azure.

With `FIRSTLIGHT_TEST_AZURITE`, the path of the program `azurite-blob`, tests ask Microsoft's emulator instead.
"""

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from firstlight.pipeline.data.mirror import places
from firstlight.pipeline.data.sources import remote_files

ACCOUNT, CONTAINER = "devstoreaccount1", "container"
# The key of the emulator's account, as its documentation gives it
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
EMULATOR_VARIABLE = "FIRSTLIGHT_TEST_AZURITE"


class BlobServer(ThreadingHTTPServer):
    """Blobs and blocks that are not committed yet, by name. There is one container."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _BlobHandler)
        self.blobs: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.blocks: dict[tuple[str, str], bytes] = {}


class _BlobHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BlobServer

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""

    def _parse(self) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(self.path)
        _, _, container, *name = unquote(parts.path).split("/", 3)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return container, name[0] if name else "", query

    def _answer(self, status: int, data: bytes = b"", code: str = "", **headers: str) -> None:
        self.send_response(status)
        told = {"x-ms-version": "2025-01-05", "x-ms-request-id": "1", **({"x-ms-error-code": code} if code else {})}
        for key, value in {**told, **{key.replace("_", "-"): value for key, value in headers.items()}}.items():
            self.send_header(key, value)
        if "Content-Length" not in told and "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _describe(self, name: str) -> dict[str, str]:
        return {
            "ETag": f'"{self.server.versions[name]}"',
            "Last_Modified": formatdate(0, usegmt=True),
            "x_ms_blob_type": "BlockBlob",
            "x_ms_creation_time": formatdate(0, usegmt=True),
            "Content_Type": "application/octet-stream",
        }

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        container, name, query = self._parse()
        if container != CONTAINER:
            return self._answer(404, code="ContainerNotFound")
        if not name:
            if query.get("comp") == "list":
                return self._answer(200, self._list(query), Content_Type="application/xml")
            return self._answer(200, ETag='"1"', Last_Modified=formatdate(0, usegmt=True))
        if name not in self.server.blobs:
            return self._answer(404, code="BlobNotFound")
        data, headers = self.server.blobs[name], self._describe(name)
        wanted = self.headers.get("x-ms-range") or self.headers.get("Range")
        if self.command == "HEAD" or not wanted:
            return self._answer(
                200, data, **headers, **({"Content_Length": str(len(data))} if self.command == "HEAD" else {})
            )
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return self._answer(416, code="InvalidRange")
        return self._answer(206, data[start:end], **headers, Content_Range=f"bytes {start}-{end - 1}/{len(data)}")

    def _list(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(name for name in self.server.blobs if name.startswith(prefix))
        found, folders = [], dict[str, None]()
        for name in names:
            below = name[len(prefix) :]
            if delimiter and delimiter in below:
                folders[prefix + below.partition(delimiter)[0] + delimiter] = None
                continue
            size, version = len(self.server.blobs[name]), self.server.versions[name]
            found.append(
                f"<Blob><Name>{escape(name)}</Name><Properties>"
                f"<Last-Modified>{formatdate(0, usegmt=True)}</Last-Modified>"
                f"<Etag>{version}</Etag><Content-Length>{size}</Content-Length><BlobType>BlockBlob</BlobType>"
                "</Properties></Blob>"
            )
        listed = "".join(f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>" for name in folders) + "".join(found)
        return (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="http://127.0.0.1" '
            f'ContainerName="{CONTAINER}"><Prefix>{escape(prefix)}</Prefix><Blobs>{listed}</Blobs><NextMarker />'
            "</EnumerationResults>"
        ).encode()

    def do_PUT(self) -> None:
        container, name, query = self._parse()
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if container != CONTAINER:
            return self._answer(404, code="ContainerNotFound")
        if query.get("comp") == "block":
            self.server.blocks[name, query["blockid"]] = data
            return self._answer(201)
        if self.headers.get("If-None-Match") == "*" and name in self.server.blobs:
            return self._answer(409, code="BlobAlreadyExists")
        if query.get("comp") == "blocklist":
            ids = re.findall(rb"<(?:Latest|Uncommitted|Committed)>(.*?)</", data)
            data = b"".join(self.server.blocks.pop((name, id.decode())) for id in ids)
        self.server.blobs[name] = data
        self.server.versions[name] = self.server.versions.get(name, 0) + 1
        return self._answer(201, ETag=f'"{self.server.versions[name]}"', Last_Modified=formatdate(0, usegmt=True))

    def do_DELETE(self) -> None:
        _, name, _ = self._parse()
        if self.server.blobs.pop(name, None) is None:
            return self._answer(404, code="BlobNotFound")
        return self._answer(202)


@contextlib.contextmanager
def serve_blobs(cache: Path) -> Iterator[int]:
    """Runs a server with an empty container for the block, with working folders below `cache`. Yields its port."""
    pytest.importorskip("adlfs", reason="adlfs is not installed: pip install -e '.[dev]'")
    emulator = os.environ.get(EMULATOR_VARIABLE)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_run_emulator(emulator, cache / "azurite") if emulator else _run_server())
        address = f"http://127.0.0.1:{port}/{ACCOUNT}"
        text = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={address};"
        environment = {"AZURE_STORAGE_CONNECTION_STRING": text, places.CACHE_VARIABLE: str(cache)}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        if emulator:
            from azure.storage.blob import BlobServiceClient

            BlobServiceClient.from_connection_string(text).create_container(CONTAINER)
        _forget_clients()
        try:
            yield port
        finally:
            _forget_clients()


def _forget_clients() -> None:
    import adlfs

    adlfs.AzureBlobFileSystem.clear_instance_cache()
    remote_files._connect_client.cache_clear()


@contextlib.contextmanager
def _run_server() -> Iterator[int]:
    server = BlobServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()


@contextlib.contextmanager
def _run_emulator(program: str, folder: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = [program, "--blobPort", str(port), "--location", str(folder), "--silent", "--skipApiVersionCheck"]
    process = subprocess.Popen(words)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()
