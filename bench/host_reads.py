"""Host reads of a training step: `python -m bench.host_reads`.

A host read is a place at which the process needs a value that the device computes, and at which it would wait for all
of a GPU's queue: `.item()`, `.tolist()`, `.numpy()`, `.cpu()`, an `if` on a tensor, and all that has a result of a size
that depends on values, as `nonzero`, `unique`, or an index by a mask. They are counted on the CPU, in the training
loop itself, from one log line to the next, without the steps that begin an epoch.

The loop is that of a GPU: on a CPU, where a look at the loss waits for nothing, it would stop at once if the loss is
not finite.
"""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.training_cases import METHOD_TRAININGS, TASK_TRAININGS, TrainingCase, build_case_job, feed_noise
from firstlight.pipeline.train import failures, update_guard
from firstlight.pipeline.train.loop import fit

READ_IMAGE_SIDE, READ_IMAGES, READ_BATCH, READ_EPOCHS = 32, 96, 16, 4
# Operators of torch whose kernel on a GPU waits, since the size of the result, or what happens next, is a value.
READING_OPERATORS = (
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
    "repeat_interleave.Tensor",
    "histc",
    "allclose",
)
# Operators that do so if an index is a mask.
MASKED_OPERATORS = ("index.Tensor", "index_put_", "index_put", "_index_put_impl_")
# Methods that copy a tensor to the host.
READING_METHODS = {
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.cpu: "cpu",
    Tensor.__array__: "__array__",
}


class HostReads:
    """Counts of host reads by name, while a block runs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        # The tensor that was copied to the host last: what is read of it then is one read.
        self.copied: Tensor | None = None

    def count_method(self, name: str, tensor: Tensor) -> None:
        """Counts a call of a method that copies `tensor` to the host."""
        if self.copied is not tensor:
            self.counts[name] += 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the reads of this thread in the block."""
        with _MethodReads(self), _OperatorReads(self):
            yield


class _MethodReads(TorchFunctionMode):
    """Counts calls of methods that copy to the host. On the CPU some of them call no operator."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = READING_METHODS.get(func)
        if name is None and func is Tensor.to and _names_host(args[1:], kwargs or {}):
            name = "to(cpu)"
        if name is not None:
            self.reads.count_method(name, args[0])
        result = func(*args, **(kwargs or {}))
        self.reads.copied = result if name in ("cpu", "to(cpu)") else None
        return result


def _names_host(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Returns True if the arguments of `Tensor.to` name the CPU by its name: a device of a tensor is that of a GPU."""
    return any(value == "cpu" for value in (*args, *kwargs.values()) if isinstance(value, str))


class _OperatorReads(TorchDispatchMode):
    """Counts operators that wait on a GPU."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        plain = name.split(".")[0]
        if name in READING_OPERATORS or plain in READING_OPERATORS:
            self.reads.counts[plain] += 1
        elif (name in MASKED_OPERATORS or plain in MASKED_OPERATORS) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.reads.counts[f"{plain} by a mask"] += 1
        return func(*args, **(kwargs or {}))


def count_case_reads(case: TrainingCase, permutes: bool = False) -> tuple[float, Counter[str]]:
    """Returns the host reads of a training step, and those of all counted steps by name.

    Args:
        case: the training.
        permutes: of NAT: True counts the epochs in which images exchange targets, False the others.
    """
    reads, counted = HostReads(), Counter[str]()
    steps = READ_IMAGES // READ_BATCH
    options = {
        "epochs": READ_EPOCHS,
        "batch_size": READ_BATCH,
        "optimizer": {"name": "SGD", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4},
        # Log lines and checkpoints are at the end alone.
        "log_every": 10**9,
        "checkpoint_every": 10**9,
    }
    total = 0

    def look_at_step(rank: int, step: int) -> None:
        nonlocal total
        epoch, place = divmod(step - 1, steps)
        is_counted = epoch >= 1 and place > 0 and step < READ_EPOCHS * steps
        if case.kind == "nat":
            is_counted = is_counted and (epoch % 3 == 0) == permutes
        if is_counted:
            total += 1
            counted.update(reads.counts)
        reads.counts.clear()

    no_look = mock.patch.object(update_guard, "is_host_memory", return_value=False)
    with tempfile.TemporaryDirectory() as folder, feed_noise(case, READ_IMAGE_SIDE), no_look:
        job = build_case_job(Path(folder) / "job", options, READ_IMAGES, torch.device("cpu"))
        learner = case.build_learner(READ_IMAGE_SIDE, READ_IMAGES, READ_EPOCHS, READ_EPOCHS * steps)
        failures.fault_hook = look_at_step
        try:
            with reads.counting():
                fit(job, learner)
        finally:
            failures.fault_hook = None
    return sum(counted.values()) / total, counted


def make_reads_table(cases: Sequence[TrainingCase]) -> Table:
    """Counts the reads of all `cases`."""
    table = Table("training", "host reads per step", "of all counted steps")
    for case in cases:
        for permutes in (False, True) if case.kind == "nat" else (False,):
            per_step, names = count_case_reads(case, permutes)
            name = f"{case.name}, exchange epochs" if permutes else case.name
            table.add_row(name, f"{per_step:.2f}", ", ".join(f"{name} {count}" for name, count in names.items()))
    return table


@click.command(help=__doc__)
def main() -> None:
    """Prints the host reads of a step of every method and task."""
    torch.set_num_threads(1)
    console = Console(width=150)
    console.print(make_reads_table(METHOD_TRAININGS), make_reads_table(TASK_TRAININGS))


if __name__ == "__main__":
    main()
