"""Arms of a comparison in processes of their own: what one sets up for itself is not there for the next."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from firstlight.pipeline.child_module import end_with_parent

ArmArguments = ParamSpec("ArmArguments")
ArmResult = TypeVar("ArmResult")


def run_in_own_process(
    work: Callable[ArmArguments, ArmResult], *arguments: ArmArguments.args, **options: ArmArguments.kwargs
) -> ArmResult:
    """Returns what a function returns in a new process with one thread of torch, which ends with this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_set_up_arm) as process:
        return process.submit(work, *arguments, **options).result()


def _set_up_arm() -> None:
    torch.set_num_threads(1)
    end_with_parent()
