"""Processes that tests may kill: forked from a server process that has imported the heavy modules and nothing else.

A fork of the test's own process would inherit its threads, and a new interpreter takes seconds for its imports.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.fork_server import get_fork_context


def run_in_clean_process(
    function: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None, timeout_s: float = 600
) -> int:
    """Calls an importable function in a process of its own. Returns the exit code, -n if signal n ended it."""
    process = get_fork_context().Process(target=_call, args=(function, arguments, dict(environment or {})))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{function.__name__} did not end within {timeout_s} s")
    return process.exitcode


def _call(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)
