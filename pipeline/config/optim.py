"""Optimisers of torch, by class name, and of timm, by their names there; learning rate schedules of torch.

A specification is checked by building the class over one dummy parameter, so that its library judges the values. The
libraries are imported where classes are looked up or built: a specification that has passed before needs neither.
"""

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from firstlight.pipeline.config.schemas.checked_specs import check_once
from firstlight.pipeline.errors import suggest_valid

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

# Left out: classes that need a closure (LBFGS), only matrices (Muon) or sparse gradients (SparseAdam).
NO_TORCH_OPTIMIZERS = ("Optimizer", "LBFGS", "Muon", "SparseAdam")
# The optimisers of timm that are left out: wrappers of others, and classes that need a closure or another package.
NO_TIMM_OPTIMIZERS = ("bnb*", "fused*", "adahessian", "kron*")
# The momentum of timm's optimisers that have one, as its `create_optimizer_v2` sets it.
TIMM_MOMENTUM = 0.9
# The batch size that `base_lr` is given for.
BASE_BATCH_SIZE = 256
# Their parameters are functions or other schedules, which a recipe cannot write.
NOT_CONFIGURABLE_SCHEDULES = ("LambdaLR", "MultiplicativeLR", "SequentialLR")
# Schedules that torch does not have, and their parameters, all of which are needed.
OWN_SCHEDULES: dict[str, tuple[str, ...]] = {"hyperbolic": ("t0", "gamma"), "partial_cosine": ("cycles",)}
# Parameters that are learning rates themselves and replace the optimiser's.
RATE_ARGUMENTS = ("max_lr", "base_lr")
# Schedules that have a warm-up of their own, or follow the loss.
OWN_WARMUP = ("OneCycleLR", "CyclicLR", "ReduceLROnPlateau")
# Parameters that default to the length of the whole training.
LENGTH_ARGUMENTS = ("T_max", "total_steps")


@cache
def list_optimizers() -> dict[str, type["torch.optim.Optimizer"]]:
    """Returns the optimisers of torch that a recipe can name, by class name."""
    import torch

    return {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in NO_TORCH_OPTIMIZERS
    }


@cache
def list_schedules() -> dict[str, type["LRScheduler"]]:
    """Returns the schedules of torch that a recipe can name, by class name."""
    from torch.optim import lr_scheduler

    found = {
        name: cls
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type)
        and issubclass(cls, lr_scheduler.LRScheduler)
        and name.endswith("LR")
        and name not in NOT_CONFIGURABLE_SCHEDULES
    }
    return {**found, "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau}


class _TorchSpec(BaseModel):
    """The name of a torch class, and its keyword arguments as further keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field(description="The name of the class.")

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of the torch class."""
        return dict(self.model_extra or {})

    def check_arguments(self, cls: Callable[..., Any]) -> None:
        """Raises ValueError if a key is not a parameter of the class `cls`."""
        known = [p for p in inspect.signature(cls).parameters if p not in ("params", "optimizer", "lr", "last_epoch")]
        for key in self.arguments():
            if key not in known:
                raise ValueError(f"{key} is not a parameter of {self.name}; {suggest_valid(key, known)}")


class OptimizerSpec(_TorchSpec):
    """An optimiser: its `name`, its learning rate, and its other parameters under the names of its library.

    `name` is a class of `torch.optim`, as AdamW, or a name of `timm.optim.list_optimizers()`, as lamb.
    """

    lr: float | None = Field(
        None,
        gt=0.0,
        description="The learning rate at the start, before the schedule changes it. null: it follows from `base_lr`.",
    )
    base_lr: float | None = Field(
        None,
        gt=0.0,
        description="The learning rate of a batch of 256 images, from which that of `batch_size` follows by `scaling`. "
        "One of `lr` and `base_lr` is given.",
    )
    scaling: Literal["linear", "sqrt"] = Field(
        "linear",
        description="How the learning rate follows from `base_lr`: it is multiplied by batch_size / 256, or by the "
        "square root of that.",
    )
    decay_all: bool = Field(
        False,
        description="true: `weight_decay` acts on all parameters, as it does in torch. false: not on biases and the "
        "weights of normalisations, nor on position embeddings and class tokens.",
    )
    weight_decay_end: float | None = Field(
        None,
        ge=0.0,
        description="The weight decay at the end: it goes there from `weight_decay` by half a cosine over the whole "
        "training, as in DINO (0.04 to 0.4, appendix A). null: it is constant.",
    )

    @model_validator(mode="after")
    def _check_builds(self) -> "OptimizerSpec":
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("needs one of lr and base_lr, and null for the other")
        if self.weight_decay_end is not None and not self.arguments().get("weight_decay"):
            raise ValueError("weight_decay_end is not valid without a weight_decay above 0, from which it goes")
        # No library refuses a rate that is positive.
        check_once(Path(__file__), ["optimizer", self.name, self.arguments()], self._check_library)
        return self

    def _check_library(self) -> None:
        cls = find_optimizer(self.name)
        self.check_arguments(cls)
        try:
            _build_dummy(cls, lr=self.lr or self.base_lr, **self.arguments())
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{self.name} refuses {self.arguments()}: {error}") from None

    def compute_rate(self, batch_size: int) -> float:
        """Returns the learning rate for global batches of `batch_size` images."""
        if self.base_lr is None:
            assert self.lr is not None
            return self.lr
        factor = batch_size / BASE_BATCH_SIZE
        return self.base_lr * (factor if self.scaling == "linear" else factor**0.5)

    def with_rate(self, rate: float) -> "OptimizerSpec":
        """Returns the optimiser with the learning rate `rate`, whatever the batch."""
        return self.model_copy(update={"lr": rate, "base_lr": None})


def find_optimizer(name: str) -> Callable[..., "torch.optim.Optimizer"]:
    """Returns the class of an optimiser by its name in torch or timm.

    timm's may be a `functools.partial` of the class, with the parameters that the name stands for.

    Raises:
        ValueError: neither has it; names the nearest.
    """
    if name in list_optimizers():
        return list_optimizers()[name]
    known = list_timm_optimizers()
    if name not in known:
        raise ValueError(f"name {name!r} is unknown; {suggest_valid(name, [*list_optimizers(), *known])}")
    import timm.optim

    library: Any = timm.optim
    info = library.get_optimizer_info(name)
    momentum = {"momentum": TIMM_MOMENTUM} if info.has_momentum else {}
    cls = library.get_optimizer_class(name, bind_defaults=False)
    return partial(cls, **{**momentum, **(info.defaults or {})})


@cache
def list_timm_optimizers() -> tuple[str, ...]:
    """Returns the names of timm's optimisers. timm is imported here alone: it takes seconds."""
    import timm.optim

    library: Any = timm.optim
    return tuple(library.list_optimizers(exclude_filters=[*NO_TIMM_OPTIMIZERS]))


class ScheduleSpec(_TorchSpec):
    """A learning rate schedule of `torch.optim.lr_scheduler`, or one of two others; the other keys are its parameters.

    `hyperbolic` multiplies the rate by 1 / (1 + gamma * max(0, t - t0)) (NAT, section 3.3). `partial_cosine` multiplies
    it by cos(pi * cycles * t / length) while that is positive, then by 0: `cycles: 0.4375` (7/16) is FixMatch's
    schedule, which ends at a fifth of the rate. A length (`T_max`, `total_steps`) that is left out is the whole
    training, or the whole `period`; a partial last epoch counts as one.
    `ReduceLROnPlateau` follows the mean training loss of an interval.
    """

    interval: Literal["step", "epoch"] = Field(
        "step",
        description="The unit of t, the time of the schedule, and of its lengths and milestones: a `step` of the "
        "optimiser, or an `epoch`, a whole pass over the training images, also where the training's length is in "
        "`steps`.",
    )
    warmup_epochs: float = Field(
        0.0,
        ge=0.0,
        description="The number of epochs in which the rate first rises linearly from near 0 to the optimiser's; the "
        "schedule begins after them, and is shorter by them. With `interval: epoch`, a whole number.",
    )
    period: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="The schedule starts again after this number of steps or epochs (the rounds of Super-AND). "
        "null: it does not start again.",
    )

    @model_validator(mode="after")
    def _check_builds(self) -> "ScheduleSpec":
        check_once(Path(__file__), ["schedule", self.model_dump(mode="json")], self._check_library)
        return self

    def _check_library(self) -> None:
        import torch

        if self.name in OWN_SCHEDULES:
            if set(self.arguments()) != set(OWN_SCHEDULES[self.name]):
                taken = " and ".join(OWN_SCHEDULES[self.name])
                raise ValueError(f"{self.name} takes {taken}, found {sorted(self.arguments())}")
        elif self.name not in list_schedules():
            known = [*list_schedules(), *OWN_SCHEDULES]
            raise ValueError(f"name {self.name!r} is unknown; {suggest_valid(self.name, known)}")
        else:
            self.check_arguments(list_schedules()[self.name])
        if self.name == "ReduceLROnPlateau" and self.period is not None:
            raise ValueError("ReduceLROnPlateau follows the training loss and takes no period")
        if self.warmup_epochs and self.name in OWN_WARMUP:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs:g} is not valid with {self.name}; valid: 0")
        if self.interval == "epoch" and not self.warmup_epochs.is_integer():
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs:g} is not valid with interval: epoch; valid: a whole number, or "
                "interval: step"
            )
        try:
            build_schedule(self, _build_dummy(torch.optim.SGD, lr=0.1), 100)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} refuses {self.arguments()}: {error}") from None


def build_optimizer(
    spec: OptimizerSpec,
    groups: "Sequence[tuple[float, Sequence[torch.nn.Parameter]]]",
    rate: float,
    never_decayed: "Collection[torch.nn.Parameter]" = (),
) -> "torch.optim.Optimizer":
    """Builds an optimiser with parameter groups for each (factor, parameters): their rate is factor * `rate`.

    Each has a second group of the parameters that are not decayed, if there is a weight decay and `spec.decay_all` is
    false: those of fewer than two dimensions, and `never_decayed`.
    """
    rates: list[dict[str, Any]] = []
    for factor, parameters in groups:
        is_split = bool(spec.arguments().get("weight_decay")) and not spec.decay_all
        exempt = {p for p in parameters if is_split and (p.ndim < 2 or any(p is one for one in never_decayed))}
        kept = [p for p in parameters if p not in exempt]
        rates += [{"params": kept, "lr": factor * rate}] if kept else []
        rest = [p for p in parameters if p in exempt]
        rates += [{"params": rest, "lr": factor * rate, "weight_decay": 0.0}] if rest else []
    return find_optimizer(spec.name)(rates, lr=rate, **spec.arguments())


def build_schedule(
    spec: ScheduleSpec | None, optimizer: "torch.optim.Optimizer", length: int, epoch_length: int = 1
) -> "LRScheduler":
    """Builds the schedule of a training of `length` steps or epochs (the unit is `spec.interval`).

    `epoch_length`: the number of such units in an epoch. The learning rate is constant if `spec` is None.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if spec is None:
        return LambdaLR(optimizer, lambda t: 1.0)
    warmup = min(round(spec.warmup_epochs * epoch_length), length)
    if warmup:
        ramp = [(t + 1) / (warmup + 1) for t in range(warmup)]
        rest = _compute_factors(
            spec.model_copy(update={"warmup_epochs": 0.0}),
            length - warmup,
            optimizer.param_groups[0]["lr"],
        )
        factors = ramp + rest
        return LambdaLR(optimizer, lambda t: factors[min(t, length - 1)])
    if spec.period is not None:
        periodic = _compute_factors(
            spec.model_copy(update={"period": None}), spec.period, optimizer.param_groups[0]["lr"]
        )
        return LambdaLR(optimizer, lambda t: periodic[t % len(periodic)])
    arguments = spec.arguments()
    if spec.name == "hyperbolic":
        t0, gamma = float(arguments["t0"]), float(arguments["gamma"])
        return LambdaLR(optimizer, lambda t: 1.0 / (1.0 + gamma * max(0.0, t - t0)))
    if spec.name == "partial_cosine":
        speed = math.pi * float(arguments["cycles"]) / length
        return LambdaLR(optimizer, lambda t: math.cos(speed * t) if 2.0 * abs(speed) * t < math.pi else 0.0)
    return _build_torch_schedule(list_schedules()[spec.name], arguments, optimizer, length)


def _build_torch_schedule(
    cls: type["LRScheduler"], arguments: dict[str, Any], optimizer: "torch.optim.Optimizer", length: int
) -> "LRScheduler":
    parameters = inspect.signature(cls).parameters
    lengths = {key: length for key in LENGTH_ARGUMENTS if key in parameters and key not in arguments}
    # A given rate is that of the first parameter group; the other groups keep their ratio to it.
    first = optimizer.param_groups[0]["lr"]
    rates = {
        key: [arguments[key] * group["lr"] / first for group in optimizer.param_groups]
        for key in RATE_ARGUMENTS
        if isinstance(arguments.get(key), float)
    }
    return cls(optimizer, **{**arguments, **lengths, **rates})


def _compute_factors(spec: ScheduleSpec, length: int, lr: float) -> list[float]:
    """Returns the learning rates of the first `length` steps or epochs as multiples of the optimiser's `lr`."""
    import torch

    optimizer = _build_dummy(torch.optim.SGD, lr=lr, momentum=0.9)
    schedule, factors = build_schedule(spec, optimizer, length), []
    for _ in range(length):
        factors.append(float(optimizer.param_groups[0]["lr"]) / lr)
        optimizer.step()
        schedule.step()
    return factors


def _build_dummy(builder: Callable[..., Any], **arguments: Any) -> "torch.optim.Optimizer":
    """Builds an optimiser over one parameter whose steps change nothing. Its arguments are checked as its class does.

    The wrapper of `add_param_group`, which excludes the method from compilation, imports torch._dynamo: more than a
    second for a parameter that is never trained. A subclass has the method without its wrapper.
    """
    import torch

    cls: Any = builder.func if isinstance(builder, partial) else builder
    bound = builder.keywords if isinstance(builder, partial) else {}
    members = {"add_param_group": inspect.unwrap(cls.add_param_group), "step": lambda self, closure=None: None}
    dummy: Any = type(cls.__name__, (cls,), members)
    built: torch.optim.Optimizer = dummy([torch.nn.Parameter(torch.zeros(1))], **{**bound, **arguments})
    return built
