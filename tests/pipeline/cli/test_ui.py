"""MLflow's web interface: its port and address, and that all of its processes end."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from firstlight.pipeline.cli.ui import free_port, runs_address, serve_ui, ui_command
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.location import parse_location
from tests.support import recipes


def test_next_free_port_is_used() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        assert taken < free_port(taken) < taken + 50


def test_no_free_port_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstlight.pipeline.cli.ui.NUM_PORTS_TRIED", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match=r"^--port: \d+ and the next 0 are taken"):
            free_port(listener.getsockname()[1])


def test_address_leads_to_the_runs_of_the_experiment() -> None:
    assert runs_address("http://127.0.0.1:5000", "1") == "http://127.0.0.1:5000/#/experiments/1/runs"


def test_command_names_only_settings_that_differ_from_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ui_command(parse_location([])).split()[-1] == "ui"
    assert ui_command(parse_location([f"storage={tmp_path}/my runs"])).endswith(f" ui 'storage={tmp_path}/my runs'")
    assert ui_command(parse_location(["tracking.uri=http://host:5000"])).endswith(" ui tracking.uri=http://host:5000")


def test_server_that_does_not_start_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstlight.pipeline.cli.ui.sys.executable", "/bin/false")
    with pytest.raises(StageFailed, match=r"^MLflow's server ended with exit code 1: it printed nothing$"):
        serve_ui(parse_location([f"storage={tmp_path}"]), "1", free_port(5600), print)


# Answers as MLflow's server does, and has a descendant in a session of its own that ignores SIGTERM.
FAKE_SERVER = f"""#!{sys.executable}
import http.server, subprocess, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
subprocess.Popen([sys.executable, "-c", ignoring], start_new_session=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# `firstlight ui` with another server: its first argument.
COMMAND_WITH_FAKE_SERVER = """
import sys
from types import SimpleNamespace
from firstlight.pipeline.cli import ui
from firstlight.pipeline.cli.main import main
from firstlight.pipeline.tracking import lineage

ui.sys, ui.UI_END_S = SimpleNamespace(executable=sys.argv.pop(1)), 0.5
lineage.read_lineage = lambda records: (SimpleNamespace(experiment_id="1"), None)
main()
"""


@contextlib.contextmanager
def running_ui(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts Python with the arguments; yields the process, and the address that it prints."""
    # A shell's background job ignores Ctrl-C, and so would its children.
    reset = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-u", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ, preexec_fn=reset
    )
    assert process.stdout is not None
    try:
        told: list[str] = []
        for line in process.stdout:
            told.append(line.strip())
            if line.startswith("http://127.0.0.1:"):
                break
        else:
            raise AssertionError(f"no address: {told}")
        yield process, told[-1]
    finally:
        process.kill()


def check_all_end(process: subprocess.Popen[str], family: list[psutil.Process]) -> None:
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert rest.splitlines()[-1] == "ended"
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.timeout(400)
def test_mlflow_listens_locally_and_its_processes_end_with_the_command(tmp_path: Path) -> None:
    TrackingClient(recipes.recipe(tmp_path))
    arguments = ("-m", "firstlight.pipeline", "ui", f"storage={tmp_path}", "--port", str(free_port(5700)))
    with running_ui(*arguments) as (process, address):
        with urllib.request.urlopen(address.partition("#")[0], timeout=20) as answer:
            assert answer.status == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        connections = [connection for one in family for connection in one.net_connections("tcp")]
        assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        check_all_end(process, family)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_descendants_that_ignore_sigterm_are_killed(tmp_path: Path, number: signal.Signals) -> None:
    server = tmp_path / "server"
    server.write_text(FAKE_SERVER)
    server.chmod(0o755)
    arguments = (str(server), "ui", f"storage={tmp_path}", "--port", str(free_port(5750)))
    with running_ui("-c", COMMAND_WITH_FAKE_SERVER, *arguments) as (process, address):
        assert address.endswith("/#/experiments/1/runs")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        process.send_signal(number)
        check_all_end(process, family)
