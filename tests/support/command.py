"""Starts `firstlight ...` in a process that can be stopped, killed or kept short of disk.

The process is forked from one that has imported everything: imports take longer than the run of a small recipe. Its
figures are saved as blank files.
"""

import contextlib
import importlib
import os
import resource
import signal
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401
import mlflow.data
import mlflow.store.artifact.local_artifact_repo
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import pytest
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo

import firstlight.pipeline.run.runner  # noqa: F401
from firstlight.pipeline.cli.main import main
from firstlight.pipeline.stages.code_version import code_version
from tests.support import mlflow_tables
from tests.support.blank_figures import save_blank
from tests.support.fork_server import forget_firstlight, get_fork_context
from tests.support.forked_ray_workers import SCRIPT_VARIABLE, SOCKET_VARIABLE, start_small_rays

# It remembers the modules that it has read, which is half of the time of a small recipe.
code_version()


def _main(
    arguments: list[str],
    output: str,
    environment: dict[str, str],
    largest_file: int | None,
    template: Path | None,
    has_small_ray: bool,
    site: Path | None,
) -> None:
    os.environ.update(environment)
    run = main
    if site is not None:
        sys.path.insert(0, str(site))
        # It looks for other packages when it is imported.
        forget_firstlight()
        run = importlib.import_module(main.__module__).main
    if template is not None:
        mlflow_tables.copy_tables_from(template, pytest.MonkeyPatch())
    os.setsid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The limit is a full disk to a write.
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv = ["firstlight", *arguments]
    with save_blank(), start_small_rays() if has_small_ray else contextlib.nullcontext():
        run()


class Command:
    """A running command. `output`: the file of what it prints."""

    def __init__(self, process: BaseProcess, output: Path) -> None:
        self.process, self._output = process, output

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 600) -> tuple[int, str]:
        """Returns its exit code (negative for a signal) and what it has printed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"did not end within {timeout} s: {self._output.read_text()}")
        return self.process.exitcode, self._output.read_text("utf-8")


def start(
    output: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    largest_file: int | None = None,
    has_small_ray: bool = False,
    site: Path | None = None,
) -> Command:
    """Starts a command, with packages of the folder `site` besides those of the tests.

    `has_small_ray`: Ray is that of `tests/support/forked_ray_workers.py`; needs the fixture of that name.
    """
    variables = dict(environment or {})
    if has_small_ray:
        variables |= {name: os.environ[name] for name in (SOCKET_VARIABLE, SCRIPT_VARIABLE)}
    options = (variables, largest_file, mlflow_tables.current_template, has_small_ray, site)
    arguments_of_main = ([*arguments], str(output), *options)
    process = get_fork_context().Process(target=_main, args=arguments_of_main)
    process.start()
    return Command(process, output)
