"""Normalisation layers by name. `sync` takes batch statistics over all workers, on CPUs as well (torch's own refuses CPU tensors)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tasks.collective import all_sum, world

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
            return self._normalise(x.float() if x.dtype != torch.float64 else x).to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * world()
        mean = all_sum(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = all_sum(centred.square().sum(dims)) / count  # two passes: E[x^2] - E[x]^2 cancels in float32
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var.dtype), momentum)
            self.num_batches_tracked.add_(1)
        return centred * (variance + self.eps).rsqrt().view(shape) * self.weight.view(shape) + self.bias.view(shape)
