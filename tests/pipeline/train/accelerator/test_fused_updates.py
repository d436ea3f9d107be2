"""The choice of fused updates, and a training that continues with another implementation of its optimiser."""

import copy
from typing import Any

import pytest
import torch

from firstlight.pipeline.config.optim import OptimizerSpec, build_optimizer
from firstlight.pipeline.train.accelerator.fused_updates import adapt_optimizer_state, choose_fused

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("spec", "device", "is_fused"),
    [
        ({"name": "AdamW"}, GPU, True),
        ({"name": "Adam"}, GPU, True),
        ({"name": "SGD", "momentum": 0.9}, GPU, True),
        ({"name": "AdamW"}, CPU, False),
        ({"name": "RMSprop"}, GPU, False),
        ({"name": "lamb"}, GPU, False),
        ({"name": "AdamW", "foreach": True}, GPU, False),
        ({"name": "AdamW", "fused": False}, GPU, False),
    ],
)
def test_optimizers_with_a_kernel_are_fused_on_a_gpu(
    spec: dict[str, Any], device: torch.device, is_fused: bool
) -> None:
    given = OptimizerSpec.model_validate({"lr": 0.1, **spec})
    chosen = choose_fused(given, device)
    assert bool(chosen.arguments().get("fused")) == is_fused
    assert is_fused or chosen == given


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False)])
def test_training_continues_with_the_other_implementation(first: bool, then: bool) -> None:
    """Fused updates have the number of steps on the device; others, on the host."""
    ends = []
    for kinds in ((first, first), (first, then)):
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        state: dict[str, Any] | None = None
        for is_fused in kinds:
            spec = OptimizerSpec.model_validate({"name": "AdamW", "lr": 0.1, "fused": is_fused})
            optimizer = build_optimizer(spec, [(1.0, list(network.parameters()))], 0.1)
            if state is not None:
                optimizer.load_state_dict(adapt_optimizer_state(state, optimizer))
                assert [group["fused"] for group in optimizer.param_groups] == [is_fused] * len(optimizer.param_groups)
            for _ in range(2):
                optimizer.zero_grad()
                network(torch.ones(4, 3)).square().sum().backward()
                optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
        ends.append(network.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])
