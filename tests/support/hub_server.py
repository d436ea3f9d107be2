"""A hub on 127.0.0.1 that keeps what the client of huggingface-hub pushes: what a push needs of its interface."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

from firstlight.pipeline.report.cards.licence import HUB_LICENCES
from tests.support.json_answers import answer_json


class HubServer(ThreadingHTTPServer):
    """Repositories by their names: whether they are private, and their files by branch.

    `token`: the only one that may write. `requests`: method and path of all requests, in order.
    """

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.token = token
        self.requests: list[str] = []
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _HubHandler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        if self._refuse_token():
            return None
        _, _, owner, name, *rest = map(unquote, self.path.partition("?")[0].strip("/").split("/"))
        repository = f"{owner}/{name}"
        if repository not in self.server.files:
            return answer_json(self, {"error": "Repository not found"}, 404)
        if rest[:1] == ["tree"]:
            files = self.server.files[repository].get(rest[1], {})
            entries = [{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in files.items()]
            return answer_json(self, entries)
        return answer_json(self, {"id": repository, "private": self.server.private[repository], "sha": "0" * 40})

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self._read_body()
        if self._refuse_token():
            return None
        parts = [unquote(part) for part in self.path.strip("/").split("/")]
        if parts[1:] == ["repos", "create"]:
            told = json.loads(body)
            repository = f"{told['organization']}/{told['name']}"
            is_new = repository not in self.server.files
            if is_new:
                self.server.files[repository] = {"main": {}}
                self.server.private[repository] = told.get("private", told.get("visibility") == "private")
            url = f"{self.server.address}/{repository}"
            return answer_json(self, {"url": url, **({} if is_new else {"error": "exists"})}, 200 if is_new else 409)
        if parts[1] == "validate-yaml":
            return answer_json(self, _find_errors(json.loads(body)["content"]))
        repository, action, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if action == "branch":
            self.server.files[repository].setdefault(branch, {})
            return answer_json(self, {})
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return answer_json(self, {"files": modes})
        _apply_commit(self.server.files[repository][branch], body)
        address = f"{self.server.address}/{repository}/commit/{'1' * 40}"
        return answer_json(self, {"commitUrl": address, "commitOid": "1" * 40, "hookOutput": ""})

    def _refuse_token(self) -> bool:
        """Answers 401 and returns True unless the request has the token."""
        if self.headers["Authorization"] == f"Bearer {self.server.token}":
            return False
        # The answer is as careless as that of a server may be: it says back what it got.
        answer_json(self, {"error": f"Invalid token {self.headers['Authorization']}"}, 401)
        return True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def _find_errors(card: str) -> dict[str, Any]:
    """Returns what the hub refuses of a front matter: no mapping, or a licence that it does not know."""
    fields = yaml.safe_load(card.split("---\n")[1])
    is_known = fields["license"] in HUB_LICENCES | {"unknown", "other"}
    errors = [] if is_known else [{"message": f'"license" must be one of a list, not {fields["license"]!r}'}]
    return {"errors": errors, "warnings": []}


def _apply_commit(files: dict[str, bytes], body: bytes) -> None:
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            assert value["encoding"] == "base64"
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "deletedFile":
            del files[value["path"]]


@contextmanager
def serve_hub(token: str) -> Iterator[HubServer]:
    """Yields a server that answers until the block ends."""
    server = HubServer(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
