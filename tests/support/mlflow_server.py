"""MLflow's server for tests, which can be killed and started again within a second.

`mlflow server` starts three interpreters, each of which imports MLflow. Here one process imports the server's app, and
forks a process that runs it for each start.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow

# Reads a port from each line, and writes the id of the process that serves on it.
HOST_PROGRAM = """
import os, signal, sys
import uvicorn
from mlflow.server.fastapi_app import app

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        uvicorn.run(app, host="127.0.0.1", port=int(line), log_level="critical")
        os._exit(0)
    print(child, flush=True)
"""
START_TIMEOUT_S = 120.0


def find_free_port() -> int:
    """Returns a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class KillableServer:
    """An MLflow server on 127.0.0.1, whose database and artifacts are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.port = find_free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        database = f"sqlite:///{folder}/server.db"
        # Creates the tables, which would take longer than the first request may.
        mlflow.MlflowClient(database).search_experiments()
        environment = {
            "_MLFLOW_SERVER_FILE_STORE": database,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self.host = subprocess.Popen(
            [sys.executable, "-c", HOST_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )
        self.pid: int | None = None

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        assert self.host.stdin is not None
        assert self.host.stdout is not None
        self.host.stdin.write(f"{self.port}\n")
        self.host.stdin.flush()
        self.pid = int(self.host.stdout.readline())
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        """Kills the server, and waits until its port is closed."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            while Path(f"/proc/{self.pid}").exists():
                time.sleep(0.01)
            self.pid = None

    def close(self) -> None:
        """Ends all processes."""
        self.kill()
        self.host.kill()
        self.host.wait()
