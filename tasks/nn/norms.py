"""Normalisation layers by name. `sync` takes batch statistics over all workers, on CPUs as well (torch's own refuses CPU tensors)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.collective import all_sum, gather, world

Norm = Literal["batch", "sync", "group"]


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """For (B, channels) or (B, channels, H, W). `group`: the largest number of groups up to 32 that divides the channels."""
    if kind == "group":
        return nn.GroupNorm(max(g for g in range(1, 33) if channels % g == 0), channels)
    return SyncBatchNorm(channels) if kind == "sync" else BatchNorm(channels)


class BatchNorm(_BatchNorm):
    """Batch normalisation for any number of dimensions; statistics are those of this worker's part of the batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        return None


class SyncBatchNorm(BatchNorm):
    """Batch normalisation with the statistics of the global batch, so that results do not depend on the number of workers."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            full = x.to(torch.promote_types(x.dtype, torch.float32))
            y, mean, variance = _GlobalNorm.apply(full, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
            self._remember(mean, variance, x.numel() // x.shape[1] * world())
            return y.to(x.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var.dtype), momentum)
        self.num_batches_tracked.add_(1)


class _GlobalNorm(torch.autograd.Function):
    """(B, C, ...) on every worker, equal B -> normalised with the mean and biased variance (C,) of all; one collective each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.ndim)]
        spread, centre = torch.var_mean(x, dims, correction=0)
        parts = gather(torch.stack((centre, spread))[None])
        # The parts are equally large: variances add up with those of the means. E[x^2] - E[x]^2 would cancel in float32.
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
        mine = torch.stack((grad.sum(dims), (grad * normalised).sum(dims)))
        everyone = all_sum(mine) / (x.numel() // x.shape[1] * world())
        inner = grad - everyone[0].view(shape) - normalised * everyone[1].view(shape)
        # The weights' gradients are this worker's own: DistributedDataParallel averages them like any other.
        return inner * (weight * scale).view(shape), mine[1], mine[0], None
