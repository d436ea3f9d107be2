"""Workers of Ray that are forked from a process which has imported torch and the recipes' runner.

Ray starts two interpreters for every worker, one that sets it up and one that becomes it; with the imports of a small
training these take five seconds of a CPU, and such a training has ten of them. Ray starts this file in place of the
first. It hands what it was given to the server, which forks. Commands that tests start have Ray's own workers.
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
from typing import NoReturn

ROOT = Path(__file__).parents[2]
SOCKET_VARIABLE, SCRIPT_VARIABLE = "TESTS_RAY_WORKERS_SOCKET", "TESTS_RAY_WORKERS_SCRIPT"
# The bytes of a message, before it.
LENGTH = struct.Struct("!I")


@contextmanager
def fork_workers() -> Iterator[None]:
    """Makes every Ray that this process starts in the block fork its workers."""
    from ray._private import ray_constants, workers

    name = ray_constants.SETUP_WORKER_FILENAME
    with tempfile.TemporaryDirectory(prefix="ray-workers-") as folder:
        address = f"{folder}/socket"
        os.environ |= {SOCKET_VARIABLE: address, SCRIPT_VARIABLE: str(Path(workers.__path__[0]) / name)}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            server = subprocess.Popen([sys.executable, "-m", __name__], stdin=listener.fileno(), cwd=ROOT)
        # Joined to the folder of Ray's own script, an absolute path stays.
        ray_constants.SETUP_WORKER_FILENAME = __file__
        try:
            yield
        finally:
            ray_constants.SETUP_WORKER_FILENAME = name
            del os.environ[SOCKET_VARIABLE], os.environ[SCRIPT_VARIABLE]
            server.kill()
            server.wait()


def serve_forks() -> None:
    """Forks a worker for every connection to the socket that is the standard input.

    Ray itself must be imported after the fork: it reads the variables of a worker when it is imported, and never again.
    """
    import pandas  # noqa: F401
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401
    import torch

    import tests.support.command  # noqa: F401

    assert "ray" not in sys.modules
    gc.freeze()
    torch.set_num_threads(1)
    # Nobody waits for the workers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener, parent = socket.socket(fileno=os.dup(0)), os.getppid()
    # The process of tests may be killed.
    while os.getppid() == parent:
        if not select.select([listener], [], [], 5)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            become_worker(connection)
        connection.close()


def become_worker(connection: socket.socket) -> NoReturn:
    with connection:
        prefix, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
        with connection.makefile("rb") as stream:
            arguments, environment, folder = json.loads(stream.read(LENGTH.unpack(prefix)[0]))
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
    # To take down all modules, which copies their pages, would take three seconds of a CPU.
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
        socket.send_fds(connection, [LENGTH.pack(len(message))], [0, 1, 2])
        connection.sendall(message)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        request_fork()
    else:
        serve_forks()
