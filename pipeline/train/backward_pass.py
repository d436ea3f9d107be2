"""The losses of a batch and their gradients, of the whole batch at once or of its parts one after the other."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from firstlight.pipeline.train.accelerator.grouped_convolutions import grouped_in_fp32
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.collective import broadcast_buffers, rank, world_size
from firstlight.tasks.device.timer import time_part
from firstlight.tasks.learner import Batch, Learner

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class BackwardPass:
    """Computes the losses of this worker's part of each batch, and their gradient in the parameters of the learner.

    `judge_loss(loss, batch, step)` is called with a loss before its gradient is computed.
    """

    def __init__(self, job: TrainingJob, learner: Learner, judge_loss: Callable[[Tensor, Batch, int], None]) -> None:
        self.job, self.learner, self.judge_loss = job, learner, judge_loss
        self.autocast_dtype = find_autocast(job.training.precision, job.device)
        # The scaler does nothing without fp16.
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=self.autocast_dtype == torch.float16)
        if self.scaler.is_enabled():
            # The first steps may be skipped, until the scale fits; the schedule counts them.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        module = _StepModule(learner)
        # `static_graph` would make the host look up in every step which parameters were used.
        self.model: nn.Module = (
            DistributedDataParallel(module, gradient_as_bucket_view=True) if world_size() > 1 else module
        )

    def compute_gradients(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns the losses, and adds their gradient to that of the parameters.

        Raises:
            StopTraining: as `judge_loss`.
        """
        if self.job.training.accumulate == 1:
            return self._backward_whole(batch, step)
        return self._backward_in_parts(batch, step)

    def _backward_whole(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Computes the losses of this worker's part of the batch, and their gradient in the parameters."""
        with self._seed_and_autocast(step, 0), time_part("forward"):
            losses: dict[str, Tensor] = self.model(batch)
        self.judge_loss(losses["loss"], batch, step)
        with time_part("backward"):
            self.scaler.scale(losses["loss"]).backward()  # type: ignore[no-untyped-call]
        return losses

    def _backward_in_parts(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns the losses and adds their gradient, with one part of the batch in memory at a time: gradient caching.

        Every part is embedded without gradient; the loss of the whole batch gives the gradient at its embedding; every
        part is embedded again, to propagate its share of that gradient. Batch statistics are those of a part. Source:
        Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup".
        """
        # DistributedDataParallel does this too, but the first pass does not use it.
        broadcast_buffers(self.learner)
        size = len(batch.ids) // self.job.training.accumulate
        parts = [batch.select_range(start, start + size) for start in range(0, len(batch.ids), size)]
        embedded = []
        for k, images in enumerate(parts):
            with torch.no_grad(), self._seed_and_autocast(step, k), time_part("forward"):
                embedded.append(self.learner.embed(images))
        outputs = tuple(torch.cat(column).requires_grad_() for column in zip(*embedded, strict=True))
        with self._autocast(), time_part("forward"):
            losses = self.learner.loss(outputs, batch)
        self.judge_loss(losses["loss"], batch, step)
        self.scaler.scale(losses["loss"]).backward()  # type: ignore[no-untyped-call]
        # The buffers are kept, so that the parts count once in the running statistics.
        buffers = [buffer.clone() for buffer in self.learner.buffers()]
        for k, images in enumerate(parts):
            gradients = [None if o.grad is None else o.grad[k * size : (k + 1) * size] for o in outputs]
            is_local = world_size() > 1 and k + 1 < len(parts)
            with self.model.no_sync() if is_local else contextlib.nullcontext():  # type: ignore[operator]
                with self._seed_and_autocast(step, k), time_part("forward"):
                    surrogate = self.model(images, gradients)
                with time_part("backward"):
                    surrogate.backward()
        for buffer, value in zip(self.learner.buffers(), buffers, strict=True):
            buffer.copy_(value)
        return losses

    @contextlib.contextmanager
    def _seed_and_autocast(self, step: int, part: int) -> Iterator[None]:
        """Seeds the random numbers of the block from (seed, step, rank, part), and sets the training's precision."""
        seed_generators(_step_seed(self.job.seed, step, rank(), part), self.job.device)
        with self._autocast():
            yield

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a block with the training's precision."""
        dtype = self.autocast_dtype
        return torch.autocast(self.job.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the random numbers of the CPU and of a training's device, as `torch.manual_seed` does.

    That function asks all kinds of devices that torch knows, which takes half a millisecond: a tenth of a small step.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class _StepModule(nn.Module):
    """The module that DistributedDataParallel wraps: every gradient in the parameters comes from its `forward`."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch, gradients: Sequence[Tensor | None] | None = None) -> Any:
        """Returns the losses of a batch.

        With `gradients`, those of a loss at the batch's embedding, it returns a scalar that has the same gradient in
        the parameters as that loss.
        """
        if gradients is None:
            return self.learner(batch)
        pairs = zip(self.learner.embed(batch), gradients, strict=True)
        return torch.stack([(output * gradient).sum() for output, gradient in pairs if gradient is not None]).sum()


def resolve_precision(precision: str, device: torch.device) -> str:
    """Returns the number format of a forward pass on `device`: `auto` becomes the best that it has for a training."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def find_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the number format of automatic mixed precision on `device`; None: float32 everywhere."""
    return AUTOCAST_DTYPES.get(resolve_precision(precision, device))


def choose_formats(
    network: nn.Module, autocast: torch.dtype | None, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Returns a block in which each layer trains in the format that it is fastest in, that of `autocast` or float32."""
    in_bf16_on_cpu = device.type == "cpu" and autocast == torch.bfloat16
    return grouped_in_fp32(network) if in_bf16_on_cpu else contextlib.nullcontext()


def _step_seed(seed: int, step: int, rank_: int, part: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank_, part)).generate_state(1, np.uint64)[0] >> 1)
