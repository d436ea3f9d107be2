"""Normalisation layers by name.

`sync` takes batch statistics over all workers, also on CPUs, whose tensors torch's own layer refuses.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.collective import all_sum, gather_over_workers, world_size

Norm = Literal["batch", "sync", "group"]


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Returns a layer for (B, channels) or (B, channels, H, W).

    `group` has the largest number of groups up to 32 that divides the channels.
    """
    if kind == "group":
        return nn.GroupNorm(max(g for g in range(1, 33) if channels % g == 0), channels)
    return SyncBatchNorm(channels) if kind == "sync" else BatchNorm(channels)


class BatchNorm(_BatchNorm):
    """Batch normalisation for any number of dimensions, with the statistics of this worker's part of the batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        return None


class SyncBatchNorm(BatchNorm):
    """Batch normalisation with the statistics of the global batch: the number of workers does not change results."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            full = x.to(torch.promote_types(x.dtype, torch.float32))
            y, mean, variance = _GlobalNorm.apply(  # type: ignore[no-untyped-call]
                full, self.weight, self.bias, self.eps
            )
            self._update_running_statistics(mean, variance, x.numel() // x.shape[1] * world_size())
            return y.to(x.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var.dtype), momentum)
        self.num_batches_tracked.add_(1)


class _GlobalNorm(torch.autograd.Function):
    """Normalises (B, C, ...) with the (C,) mean and biased variance of all workers. B must be the same on all workers.

    It takes one collective forward and one backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.ndim)]
        spread, centre = torch.var_mean(x, dims, correction=0)
        parts = gather_over_workers(torch.stack((centre, spread))[None])
        # The parts are equally large: variances add up with those of the means. E[x^2] - E[x]^2 would cancel in
        # float32.
        mean = parts[:, 0].mean(0)
        variance = parts[:, 1].mean(0) + (parts[:, 0] - mean).square().mean(0)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        normalised = (x - mean.view(shape)) * scale.view(shape)
        own = torch.stack((grad.sum(dims), (grad * normalised).sum(dims)))
        everyone = all_sum(own) / (x.numel() // x.shape[1] * world_size())
        inner = grad - everyone[0].view(shape) - normalised * everyone[1].view(shape)
        # The weights' gradients are this worker's own: DistributedDataParallel averages them like any other.
        return inner * (weight * scale).view(shape), own[1], own[0], None
