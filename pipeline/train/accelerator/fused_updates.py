"""Fused updates of torch's optimisers: one kernel for all weights, which also leaves an update out by itself."""

from typing import Any

import torch

from firstlight.pipeline.config.optim import OptimizerSpec

# The classes of torch that have a kernel for all weights on a GPU.
FUSED_OPTIMIZERS = ("Adam", "AdamW", "SGD")
# Parameters of a recipe by which it chooses another implementation of the update.
IMPLEMENTATION_KEYS = ("capturable", "differentiable", "foreach", "fused")


def choose_fused(spec: OptimizerSpec, device: torch.device) -> OptimizerSpec:
    """Returns the optimiser with `fused: true` where the device and the class have it, and the recipe has no say.

    On a CPU the result would differ in the last bit from torch's default.
    """
    is_chosen = any(key in spec.arguments() for key in IMPLEMENTATION_KEYS)
    if device.type != "cuda" or spec.name not in FUSED_OPTIMIZERS or is_chosen:
        return spec
    return spec.model_copy(update={"fused": True})


def adapt_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an optimiser's state from a checkpoint with the implementation of `optimizer`.

    A training may continue on another device than it was begun on. The place where torch keeps the numbers of steps
    depends on the choice of a fused update.
    """
    groups = [
        {**saved, **({"fused": own["fused"]} if "fused" in own else {})}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}
