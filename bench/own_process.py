"""Arms of a comparison in processes of their own: what one sets up for itself is not there for the next."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import torch

ArmArguments = ParamSpec("ArmArguments")
ArmResult = TypeVar("ArmResult")


def run_in_own_process(
    work: Callable[ArmArguments, ArmResult], *arguments: ArmArguments.args, **options: ArmArguments.kwargs
) -> ArmResult:
    """Returns what a function returns in a new process with one thread of torch."""
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as process:
        return process.submit(work, *arguments, **options).result()
