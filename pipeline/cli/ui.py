"""`firstlight ui`: MLflow's web interface on the runs of a storage, reachable from this machine only."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.tracking.location import TrackingLocation

UI_HOST = "127.0.0.1"
# Consecutive ports that are tried, from the requested one on.
NUM_PORTS_TRIED = 50
# Seconds that MLflow has to start, and its processes have to end.
UI_START_S, UI_END_S = 300.0, 3.0
# No helper processes, and no telemetry.
QUIET_SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def free_port(first: int) -> int:
    """Returns `first`, or the next port that nobody listens at.

    Raises:
        UserError: the next `NUM_PORTS_TRIED` ports are taken.
    """
    for port in range(first, min(first + NUM_PORTS_TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((UI_HOST, port))
                return port
    raise UserError(f"--port: {first} and the next {NUM_PORTS_TRIED - 1} are taken; give another")


def runs_address(address: str, experiment: str) -> str:
    """Returns the address of an experiment's runs, which is not MLflow's start page."""
    return f"{address}/#/experiments/{experiment}/runs"


def serve_ui(records: TrackingLocation, experiment: str, port: int, write: Callable[[str], None]) -> None:
    """Runs MLflow's server until Ctrl-C or SIGTERM, and writes its address once it answers.

    Raises:
        StageFailed: the server ended by itself; the message has the last line that it printed.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", UI_HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", records.uri, "--default-artifact-root", records.artifacts]
    environment = {**os.environ, **QUIET_SERVER}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        with _end_processes(process):
            _wait_until_healthy(process, port, log.fileno())
            write(f"{runs_address(f'http://{UI_HOST}:{port}', experiment)}\nCtrl-C ends it")
            process.wait()
            raise StageFailed(_describe_server_failure(process, log.fileno()))


@contextlib.contextmanager
def _end_processes(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the server and all of its descendants, whatever process group they are in.

    MLflow starts processes that do not end with it.
    """
    try:
        yield
    finally:
        # A second Ctrl-C would leave some of them running.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        family = _list_processes(process)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
            _, family = psutil.wait_procs(family, timeout=UI_END_S)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _list_processes(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Returns the descendants of a process and the process itself; empty if it has ended."""
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: int) -> None:
    end, url = time.monotonic() + UI_START_S, f"http://{UI_HOST}:{port}/health"
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise StageFailed(_describe_server_failure(process, log))


def _describe_server_failure(process: subprocess.Popen[bytes], log: int) -> str:
    lines = os.pread(log, 100_000, 0).decode("utf-8", "replace").strip().splitlines()
    outcome = "did not answer" if process.poll() is None else f"ended with exit code {process.returncode}"
    return f"MLflow's server {outcome}: {lines[-1][:300] if lines else 'it printed nothing'}"


def ui_command(records: TrackingLocation) -> str:
    """Returns the command that opens these runs, as it can be typed in the current folder."""
    script, found = Path(sys.executable).parent / "firstlight", shutil.which("firstlight")
    on_path = found is not None and Path(found).resolve() == script.resolve()
    return shlex.join(["firstlight" if on_path else _shorten_path(script), "ui", *records.as_overrides])


def _shorten_path(script: Path) -> str:
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)
