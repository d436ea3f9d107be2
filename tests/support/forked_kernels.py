"""Kernels of notebooks that are forked from a process which has imported torch, MLflow and matplotlib.

Each imports Firstlight anew, as a kernel of Jupyter does. New interpreters would spend half of the time of a small
notebook on imports.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support import mlflow_tables
from tests.support.fork_server import forget_firstlight
from tests.support.forked_ray_workers import leave_out_processes

INLINE_BACKEND = "module://matplotlib_inline.backend_inline"


class WaitingKernel:
    """A process that becomes a kernel when `become` tells it to. Has what Jupyter asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, template: Path | None) -> None:
        """`template`: the database that MLflow's new databases are copies of, see `mlflow_tables`."""
        (reading, self._request), (is_ready, ready) = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._request)
            # Jupyter sends signals to the group of the kernel.
            os.setsid()
            os.write(ready, b".")
            os.close(ready)
            _become_kernel(reading, template)
        os.close(reading)
        os.close(ready)
        os.read(is_ready, 1)
        os.close(is_ready)

    def become(self, command: list[str], env: dict[str, str], cwd: str, **options: Any) -> "WaitingKernel":
        """Takes the place of `jupyter_client.launcher.launch_kernel`."""
        os.write(self._request, json.dumps([command, env, cwd]).encode())
        os.close(self._request)
        return self

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _become_kernel(reading: int, template: Path | None) -> NoReturn:
    with open(reading, encoding="utf-8") as file:
        request = file.read()
    # An empty request means that the process that would have sent one has ended.
    if request:
        command, environment, folder = json.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        forget_firstlight()
        import matplotlib

        # Matplotlib has read the variable by which a kernel chooses it.
        matplotlib.rcParams["backend"] = INLINE_BACKEND
        patch = pytest.MonkeyPatch()
        leave_out_processes(patch)
        if template is not None:
            mlflow_tables.copy_tables_from(template, patch)
        # The interpreter is left out: -m, ipykernel_launcher, and its arguments follow it.
        sys.argv = command[2:]
        try:
            runpy.run_module(command[2], run_name="__main__")
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()
    os._exit(0)


@contextmanager
def fork_kernels(number: int, template: Path | None) -> Iterator[None]:
    """Makes the next `number` kernels that Jupyter starts forks of this process, as it is now."""
    from jupyter_client.provisioning import local_provisioner

    waiting = [WaitingKernel(template) for _ in range(number)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            local_provisioner, "launch_kernel", lambda *request, **options: waiting.pop().become(*request, **options)
        )
        try:
            yield
        finally:
            for kernel in waiting:
                kernel.kill()
