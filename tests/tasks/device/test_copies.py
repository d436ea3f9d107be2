"""Copies of arrays to a device."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from firstlight.tasks.device.copies import send_array

CPU = torch.device("cpu")


def test_sent_array_may_be_written_to_without_a_change_of_a_read_only_one() -> None:
    array = np.arange(4)
    array.setflags(write=False)
    sent = send_array(array, CPU)
    sent += 1
    assert sent.tolist() == [1, 2, 3, 4]
    assert array.tolist() == [0, 1, 2, 3]
    tensor = torch.ones(2)
    assert send_array(tensor, CPU) is tensor


def test_copies_to_a_gpu_are_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)) or self)
    send_array(np.arange(3), torch.device("cuda"))
    assert calls == ["pinned", ((torch.device("cuda"),), {"non_blocking": True})]
