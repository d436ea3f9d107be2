"""A hub on 127.0.0.1 with data sets: what huggingface-hub asks for to list and read the files of a commit."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT, OTHER_COMMIT = "1" * 40, "2" * 40


class DatasetHub(ThreadingHTTPServer):
    """Files by the id of their commit, and commits by the name of a revision, of the data set `owner/photos`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _DatasetHandler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main": COMMIT, "old": OTHER_COMMIT, COMMIT: COMMIT, OTHER_COMMIT: OTHER_COMMIT}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _DatasetHandler(BaseHTTPRequestHandler):
    server: DatasetHub

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""

    def do_HEAD(self) -> None:
        self._handle(has_body=False)

    def do_GET(self) -> None:
        self._handle(has_body=True)

    def do_POST(self) -> None:
        """Answers paths-info, for which the paths are fields of a form or JSON."""
        body = unquote(self.rfile.read(int(self.headers["Content-Length"])).decode().replace("+", " "))
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        files = self.server.files[self.server.revisions[parts[5]]]
        self._answer(200, json.dumps([_describe(name, files[name]) for name in files if name in body]).encode())

    def _handle(self, has_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        in_api = parts[0] == "api"
        repo, rest = "/".join(parts[in_api + 1 : in_api + 3]), parts[in_api + 3 :]
        if repo != "owner/photos":
            return self._answer(404, b'{"error": "Repository not found"}', code="RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.server.revisions.get(revision)
        if commit is None:
            return self._answer(404, b'{"error": "Invalid rev id"}', code="RevisionNotFound")
        files = self.server.files[commit]
        if in_api and rest[:1] != ["tree"]:
            told = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self._answer(200, json.dumps(told).encode())
        if in_api:
            below = "/".join(rest[2:])
            return self._answer(
                200, json.dumps(_list_tree(files, below, "recursive=true" in self.path.lower())).encode()
            )
        data = files.get("/".join(rest[2:]))
        if data is None:
            return self._answer(404, b"Entry not found", code="EntryNotFound")
        headers = {"ETag": _hash_blob(data), "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            return self._answer(206, data[int(first) : end], headers, has_body=has_body)
        return self._answer(200, data, headers, has_body=has_body)

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, code: str = "", has_body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in ({"X-Error-Code": code} if code else {} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if has_body:
            self.wfile.write(data)


def _hash_blob(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


def _describe(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _hash_blob(data)}


def _list_tree(files: dict[str, bytes], below: str, is_deep: bool) -> list[dict[str, Any]]:
    start = f"{below}/" if below else ""
    found = [name for name in files if name.startswith(start)]
    entries = [_describe(name, files[name]) for name in found if is_deep or "/" not in name[len(start) :]]
    parts = {name[len(start) :].partition("/")[0] for name in found if "/" in name[len(start) :]}
    return entries + [{"type": "directory", "path": f"{start}{part}", "size": 0, "oid": "0"} for part in sorted(parts)]


@contextmanager
def serve_datasets(monkeypatch: Any) -> Iterator[DatasetHub]:
    """Runs a hub for the block, which the library of this process asks, whatever hub it knew before."""
    import fsspec
    from huggingface_hub import HfFileSystem, constants, hf_api

    from firstlight.pipeline.data.sources import remote_files

    hub = DatasetHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    for module in (constants, hf_api.constants):
        monkeypatch.setattr(module, "ENDPOINT", hub.address)
    template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template.removeprefix("{endpoint}"))
    monkeypatch.setitem(os.environ, "HF_ENDPOINT", hub.address)
    HfFileSystem.clear_instance_cache()
    remote_files._connect_client.cache_clear()
    assert fsspec.get_filesystem_class("hf") is HfFileSystem
    try:
        yield hub
    finally:
        hub.shutdown()
        HfFileSystem.clear_instance_cache()
        remote_files._connect_client.cache_clear()
