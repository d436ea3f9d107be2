"""`firstlight ui`: MLflow's pages over the runs of a storage, on this machine only."""

import contextlib
import os
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
from firstlight.pipeline.tracking.location import Records

HOST = "127.0.0.1"
PORT = 5000
TRIED = 50  # ports behind the one that is asked for
START_S, END_S = 120.0, 3.0  # that MLflow has to start, and its processes to end


def free_port(first: int) -> int:
    """`first`, or the next one that nobody listens at.

    Raises:
        UserError: none of the next ones is free.
    """
    for port in range(first, min(first + TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise UserError(f"--port: {first} and the {TRIED - 1} behind it are taken; give another")


def page(address: str, experiment: str) -> str:
    """The address of the runs; MLflow's first page is another."""
    return f"{address}/#/experiments/{experiment}/runs"


def serve(records: Records, experiment: str, port: int, tell: Callable[[str], None]) -> None:
    """Until Ctrl-C or SIGTERM.

    Raises:
        StageFailed: MLflow ended by itself; with the last line that it said.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", records.uri, "--default-artifact-root", str(records.storage / "mlartifacts")]
    quiet = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # no helpers beside it, nothing sent
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, start_new_session=True, env={**os.environ, **quiet}
        )
        with _ended(process):
            _wait(process, port, said.fileno())
            tell(f"{page(f'http://{HOST}:{port}', experiment)}\nCtrl-C ends it")
            process.wait()
            raise StageFailed(_died(process, said.fileno()))


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """MLflow starts processes of its own, which do not end with it: all of them are ended, whatever group they are in."""
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave some behind
        family = _family(process)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(sent)
            _, family = psutil.wait_procs(family, timeout=END_S)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def _wait(process: subprocess.Popen[bytes], port: int, said: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise StageFailed(_died(process, said))


def _died(process: subprocess.Popen[bytes], said: int) -> str:
    data = os.pread(said, 100_000, 0).decode("utf-8", "replace").strip().splitlines()
    how = "did not answer" if process.poll() is None else f"ended with exit code {process.returncode}"
    return f"MLflow's server {how}: {data[-1][:300] if data else 'it said nothing'}"


def hint(records: Records) -> str:
    """The command that opens these runs, as it can be typed here."""
    import shlex
    import shutil

    script = Path(sys.executable).parent / "firstlight"
    found = shutil.which("firstlight")
    name = "firstlight" if found and Path(found).resolve() == script.resolve() else _nearest(script)
    return shlex.join([name, "ui", *records.words])


def _nearest(script: Path) -> str:
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)
