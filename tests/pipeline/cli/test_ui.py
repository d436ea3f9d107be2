"""MLflow's pages: the right port and address, and nothing that stays behind."""

import functools
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from firstlight.pipeline.cli.ui import free_port, hint, page, serve
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.location import named
from tests.support import recipes


def test_the_next_free_port_is_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        assert taken < free_port(taken) < taken + 50


def test_no_free_port_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstlight.pipeline.cli.ui.TRIED", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match=r"^--port: \d+ and the 0 behind it are taken"):
            free_port(listener.getsockname()[1])


def test_the_page_is_that_of_the_runs() -> None:
    assert page("http://127.0.0.1:5000", "1") == "http://127.0.0.1:5000/#/experiments/1/runs"


def test_the_hint_says_no_more_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hint(named([])).split()[-1] == "ui"
    assert hint(named([f"storage={tmp_path}/my runs"])).endswith(f" ui 'storage={tmp_path}/my runs'")
    assert hint(named(["tracking.uri=http://host:5000"])).endswith(" ui tracking.uri=http://host:5000")


def test_a_server_that_does_not_start_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstlight.pipeline.cli.ui.sys.executable", "/bin/false")
    with pytest.raises(StageFailed, match=r"^MLflow's server ended with exit code 1: it said nothing$"):
        serve(named([f"storage={tmp_path}"]), "1", free_port(5600), print)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_its_processes_end_with_it(tmp_path: Path, number: signal.Signals) -> None:
    Tracking(recipes.recipe(tmp_path))
    command = [sys.executable, "-u", "-m", "pipeline", "ui", f"storage={tmp_path}", "--port", str(free_port(5700))]
    reset = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background job ignores Ctrl-C, and so would its children
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ, preexec_fn=reset
    )
    assert process.stdout is not None
    try:
        address = next(line.strip() for line in process.stdout if line.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(address.partition("#")[0], timeout=20) as answer:
            assert answer.status == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        listening = [
            at.laddr.ip for one in family for at in one.net_connections("tcp") if at.status == psutil.CONN_LISTEN
        ]
        assert set(listening) == {"127.0.0.1"}
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        assert rest.splitlines()[-1] == "ended"
        assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    finally:
        process.kill()
