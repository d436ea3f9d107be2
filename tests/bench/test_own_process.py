"""An arm runs in another process, which has one thread."""

import os
import threading
from pathlib import Path

import pytest
import torch

from bench.own_process import run_in_own_process


def set_up(folder: str) -> tuple[int, list[str], int, str]:
    """Goes to a folder. Returns the process, the names of its threads, the number of those of torch, and its folder."""
    os.chdir(folder)
    return os.getpid(), [thread.name for thread in threading.enumerate()], torch.get_num_threads(), os.getcwd()


def test_arm_runs_in_a_process_of_its_own_with_one_thread() -> None:
    process, threads, torch_threads, folder = run_in_own_process(set_up, "/")
    assert folder == "/"
    assert Path.cwd() != Path("/")
    assert process != os.getpid()
    assert "parent" in threads, "it ends if the command is killed"
    assert torch_threads == 1


def test_error_of_an_arm_is_raised() -> None:
    with pytest.raises(FileNotFoundError):
        run_in_own_process(os.chdir, "/no such folder")
