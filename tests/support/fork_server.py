"""The server process from which tests fork others: gloo pools, commands that are stopped, processes that are killed.

A process of tests has one server, which imports what the first user of it names: all name the same modules, because a
forked process that has to import torch and MLflow by itself needs ten times as long as a small recipe.
"""

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

# torch._dynamo is imported by DistributedDataParallel when it is first used.
PRELOADED = ["torch._dynamo", "tests.support.command", "tests.support.learners", "tests.support.two_workers"]


def get_fork_context() -> ForkServerContext:
    """Returns the context whose processes are forked from the server with all heavy modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def forget_firstlight() -> None:
    """Removes the modules of Firstlight, with which a process was forked, so that it imports them anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "firstlight"]:
        del sys.modules[name]
