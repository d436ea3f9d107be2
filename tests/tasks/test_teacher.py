"""A teacher follows its network, gets no gradient, and travels with the state of the method."""

import math

import pytest
import torch
from torch import nn

from firstlight.tasks.teacher import Teacher, raise_momentum


def build_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_momentum_rises_from_its_start_to_one_by_a_cosine() -> None:
    found = [raise_momentum(0.96, step, 100) for step in (0, 25, 50, 75, 100)]
    expected = [1 - 0.04 * (math.cos(math.pi * share) + 1) / 2 for share in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(expected)
    assert (found[0], found[-1]) == (pytest.approx(0.96), 1.0)


def test_teacher_is_the_weighted_mean_of_itself_and_its_network() -> None:
    network = build_network()
    teacher = Teacher(network)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    teacher.follow(network, 0.75)
    for own, old, new in zip(teacher.parameters(), before, network.parameters(), strict=True):
        torch.testing.assert_close(own, 0.75 * old + 0.25 * new)
    teacher.follow(network, 1.0)
    for own, old, new in zip(teacher.parameters(), before, network.parameters(), strict=True):
        torch.testing.assert_close(own, 0.75 * old + 0.25 * new)


def test_teacher_gets_no_gradient_and_keeps_none() -> None:
    network = build_network()
    teacher = Teacher(network)
    images = torch.randn(5, 3, requires_grad=True)
    assert not teacher(images).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_running_statistics_are_those_of_the_teachers_own_batches() -> None:
    network = build_network()
    teacher = Teacher(network).train()
    network(torch.randn(8, 3) + 5.0)
    teacher.follow(network, 0.0)
    running: torch.Tensor = teacher.network[1].running_mean  # type: ignore[index, assignment]
    assert torch.equal(running, torch.zeros(4))
    teacher(torch.randn(8, 3) + 5.0)
    assert not torch.equal(running, torch.zeros(4))


class TaughtNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = build_network()
        self.teacher = Teacher(self.student)


def test_teacher_is_in_the_state_of_its_method() -> None:
    method, other = TaughtNetwork(), TaughtNetwork()
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(1.0)
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "teacher"}
    other.load_state_dict(method.state_dict())
    for own, theirs, student in zip(
        other.teacher.parameters(), method.teacher.parameters(), other.student.parameters(), strict=True
    ):
        assert torch.equal(own, theirs)
        assert not torch.equal(own, student)
