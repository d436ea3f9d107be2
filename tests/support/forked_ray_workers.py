"""Workers of Ray that are forked from a process which has imported torch and the recipes' runner.

Ray starts two interpreters for every worker, one that sets it up and one that becomes it; with the imports of a small
training these take five seconds of a CPU, and such a training has ten of them. Ray starts this file in place of the
first. It hands what it was given to the server, which forks.
"""

import argparse
import atexit
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]
SOCKET_VARIABLE, SCRIPT_VARIABLE = "TESTS_RAY_WORKERS_SOCKET", "TESTS_RAY_WORKERS_SCRIPT"
# The variables that Ray sets in its workers: the process that they belong to, which is another one in every cluster,
# and their job.
RAYLET_VARIABLE, JOB_VARIABLE = "RAY_RAYLET_PID", "RAY_JOB_ID"
# The bytes of a message, before it.
LENGTH = struct.Struct("!I")


@contextmanager
def fork_workers() -> Iterator[None]:
    """Makes every Ray that this process starts in the block fork its workers."""
    from ray._private import ray_constants, workers

    with tempfile.TemporaryDirectory(prefix="ray-workers-") as folder:
        address = f"{folder}/socket"
        os.environ |= {
            SOCKET_VARIABLE: address,
            SCRIPT_VARIABLE: str(Path(workers.__path__[0]) / ray_constants.SETUP_WORKER_FILENAME),
        }
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            server = subprocess.Popen([sys.executable, "-m", __name__], stdin=listener.fileno(), cwd=ROOT)
        try:
            with start_small_rays():
                yield
        finally:
            del os.environ[SOCKET_VARIABLE], os.environ[SCRIPT_VARIABLE]
            server.kill()
            server.wait()


@contextmanager
def start_small_rays() -> Iterator[None]:
    """Makes every Ray that this process starts in the block get its workers from the server of `SOCKET_VARIABLE`."""
    import pytest
    from ray._private import ray_constants

    with pytest.MonkeyPatch.context() as patch:
        # An absolute path stays when it is joined to the folder of Ray's own script.
        patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", __file__)
        leave_out_processes(patch)
        yield


def leave_out_processes(patch: "pytest.MonkeyPatch") -> None:
    """Lets Ray start no process for a dashboard, for machines that are added on demand and for the output of workers.

    Each takes seconds of a CPU for its imports.
    """
    from ray._private import node

    for process in ("start_api_server", "start_log_monitor", "start_monitor"):
        patch.setattr(node.Node, process, lambda self, **options: None)


def serve_forks() -> None:
    """Hands every request for a worker to the process that forks the workers of its cluster, and starts that process.

    Ray reads some of the variables of a worker when it is imported, and never again. Each set of these has a process
    that imports Ray once for all its workers.
    """
    import pandas  # noqa: F401
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401
    import torch

    import tests.support.command  # noqa: F401

    assert "ray" not in sys.modules
    gc.freeze()
    torch.set_num_threads(1)
    # Nobody waits for the other processes.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener, parent = socket.socket(fileno=os.dup(0)), os.getppid()
    clusters: dict[frozenset, socket.socket] = {}
    # The process of tests may be killed.
    while os.getppid() == parent:
        if not select.select([listener], [], [], 5)[0]:
            continue
        connection, _ = listener.accept()
        with connection:
            message, files = receive_request(connection)
        environment = json.loads(message)[1]
        read_once = frozenset(v for v in environment.items() if v[0].startswith("RAY_") and v[0] != JOB_VARIABLE)
        try:
            send_request(clusters[read_once], message, files)
        except (KeyError, BrokenPipeError):
            clusters[read_once], other = socket.socketpair()
            if os.fork() == 0:
                listener.close()
                for end in clusters.values():
                    end.close()
                serve_cluster(other, environment)
            other.close()
            send_request(clusters[read_once], message, files)
        for file in files:
            os.close(file)


def receive_request(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Returns a message (the arguments, variables and folder of a worker) and the files of its standard streams."""
    prefix, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
    if not prefix:
        raise EOFError
    length, message = LENGTH.unpack(prefix)[0], b""
    while len(message) < length:
        message += connection.recv(length - len(message))
    return message, files


def send_request(connection: socket.socket, message: bytes, files: list[int]) -> None:
    socket.send_fds(connection, [LENGTH.pack(len(message))], files)
    connection.sendall(message)


def serve_cluster(connection: socket.socket, environment: dict[str, str]) -> NoReturn:
    """Forks a worker for every request of one cluster."""
    os.environ.clear()
    os.environ.update(environment)
    import ray.actor

    # The first random id seeds Ray's generator, and all workers would go on from there, with the same ids of objects.
    # Every class of actors draws one when it is defined.
    original: Any = ray.actor.ActorClassID
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: original(os.urandom(original.size())))
    import ray.dag
    import ray.data
    import ray.train.torch
    import ray.tune

    ray.actor.ActorClassID = original
    gc.freeze()
    raylet = int(environment[RAYLET_VARIABLE])
    while Path(f"/proc/{raylet}").exists():
        if not select.select([connection], [], [], 5)[0]:
            continue
        try:
            message, files = receive_request(connection)
        except EOFError:
            break
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            become_worker(message, files)
        for file in files:
            os.close(file)
    os._exit(0)


def become_worker(message: bytes, files: list[int]) -> NoReturn:
    arguments, environment, folder = json.loads(message)
    # Ray kills what remains in the process group of a worker that has ended.
    os.setpgrp()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    code: object = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # The modules are not taken down, which would copy their pages and take three seconds of a CPU.
    os._exit(code if isinstance(code, int) else 1)


def request_fork() -> None:
    """Asks the server for the worker that Ray wants; Ray's script makes one that needs more than variables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    known, arguments = parser.parse_known_args()
    context = json.loads(known.serialized_runtime_env_context)
    variables, program = context.pop("env_vars", {}), context.pop("py_executable", sys.executable)
    if any(context.values()) or program != sys.executable:
        os.execv(sys.executable, [sys.executable, os.environ[SCRIPT_VARIABLE], *sys.argv[1:]])
    message = json.dumps([arguments, {**os.environ, **variables}, os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET_VARIABLE])
        send_request(connection, message, [0, 1, 2])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        request_fork()
    else:
        serve_forks()
