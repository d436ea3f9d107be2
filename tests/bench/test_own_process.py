"""An arm runs in another process, which has one thread."""

import os
import threading
from pathlib import Path

import pytest
import torch

from bench.own_process import run_in_own_process


def name_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_what_an_arm_sets_up_is_not_there_for_the_next() -> None:
    run_in_own_process(os.chdir, "/")
    assert Path.cwd() != Path("/")
    assert run_in_own_process(os.getpid) != os.getpid()
    assert "parent" in run_in_own_process(name_threads), "it ends if the command is killed"


def test_an_arm_has_one_thread_and_its_error_is_raised() -> None:
    assert run_in_own_process(torch.get_num_threads) == 1
    with pytest.raises(FileNotFoundError):
        run_in_own_process(os.chdir, "/no such folder")
