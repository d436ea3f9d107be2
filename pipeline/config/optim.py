"""Optimisers and learning rate schedules of torch, by class name.

A specification is checked by building the class over one dummy parameter, so that torch itself judges the values.
"""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from firstlight.pipeline.errors import suggest_valid

# Left out: classes that need a closure (LBFGS), only matrices (Muon) or sparse gradients (SparseAdam).
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "Muon", "SparseAdam")
}
# Their parameters are functions or other schedules, which a recipe cannot write.
NOT_CONFIGURABLE_SCHEDULES = ("LambdaLR", "MultiplicativeLR", "SequentialLR")
SCHEDULES: dict[str, type[LRScheduler]] = {
    name: cls
    for name, cls in vars(torch.optim.lr_scheduler).items()
    if isinstance(cls, type)
    and issubclass(cls, LRScheduler)
    and name.endswith("LR")
    and name not in NOT_CONFIGURABLE_SCHEDULES
}
SCHEDULES["ReduceLROnPlateau"] = ReduceLROnPlateau
# Parameters that are learning rates themselves and replace the optimiser's.
RATE_ARGUMENTS = ("max_lr", "base_lr")
# Parameters that default to the length of the whole training.
LENGTH_ARGUMENTS = ("T_max", "total_steps")


class _TorchSpec(BaseModel):
    """The name of a torch class, and its keyword arguments as further keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field(description="The name of the class.")

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of the torch class."""
        return dict(self.model_extra or {})

    def check_arguments(self, cls: type) -> None:
        """Raises ValueError if a key is not a parameter of `cls`."""
        known = [p for p in inspect.signature(cls).parameters if p not in ("params", "optimizer", "lr", "last_epoch")]
        for key in self.arguments():
            if key not in known:
                raise ValueError(f"{key} is not a parameter of {self.name}; {suggest_valid(key, known)}")


class OptimizerSpec(_TorchSpec):
    """An optimiser of `torch.optim`: its class `name`, `lr`, and its other parameters under torch's names."""

    lr: float = Field(gt=0.0, description="The learning rate at the start, before the schedule changes it.")

    @model_validator(mode="after")
    def _check_builds(self) -> "OptimizerSpec":
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name {self.name!r} is unknown; {suggest_valid(self.name, OPTIMIZERS)}")
        self.check_arguments(OPTIMIZERS[self.name])
        try:
            _build_dummy(OPTIMIZERS[self.name], lr=self.lr, **self.arguments())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} refuses {self.arguments()}: {error}") from None
        return self


class ScheduleSpec(_TorchSpec):
    """A learning rate schedule of `torch.optim.lr_scheduler`, or `hyperbolic`; the other keys are its parameters.

    `hyperbolic` multiplies the rate by 1 / (1 + gamma * max(0, t - t0)) (NAT, section 3.3). A length (`T_max`,
    `total_steps`) that is left out is the whole training, or the whole `period`; a partial last epoch counts as one.
    `ReduceLROnPlateau` follows the mean training loss of an interval.
    """

    interval: Literal["step", "epoch"] = Field(
        "step",
        description="The unit of t, the time of the schedule, and of its lengths and milestones: a `step` of the "
        "optimiser, or an `epoch`, a whole pass over the training images, also where the training's length is in "
        "`steps`.",
    )
    period: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="The schedule starts again after this number of steps or epochs (the rounds of Super-AND). "
        "null: it does not start again.",
    )

    @model_validator(mode="after")
    def _check_builds(self) -> "ScheduleSpec":
        if self.name == "hyperbolic":
            if set(self.arguments()) != {"t0", "gamma"}:
                raise ValueError(f"hyperbolic takes t0 and gamma, found {sorted(self.arguments())}")
        elif self.name not in SCHEDULES:
            raise ValueError(f"name {self.name!r} is unknown; {suggest_valid(self.name, [*SCHEDULES, 'hyperbolic'])}")
        else:
            self.check_arguments(SCHEDULES[self.name])
        if self.name == "ReduceLROnPlateau" and self.period is not None:
            raise ValueError("ReduceLROnPlateau follows the training loss and takes no period")
        try:
            build_schedule(self, _build_dummy(torch.optim.SGD, lr=0.1), 100)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} refuses {self.arguments()}: {error}") from None
        return self


def build_optimizer(
    spec: OptimizerSpec, groups: Sequence[tuple[float, Sequence[torch.nn.Parameter]]]
) -> torch.optim.Optimizer:
    """Builds an optimiser with one parameter group for each (factor, parameters): its rate is factor * `spec.lr`."""
    rates = [{"params": list(parameters), "lr": factor * spec.lr} for factor, parameters in groups]
    return OPTIMIZERS[spec.name](rates, lr=spec.lr, **spec.arguments())  # type: ignore[call-arg]


def build_schedule(spec: ScheduleSpec | None, optimizer: torch.optim.Optimizer, length: int) -> LRScheduler:
    """Builds the schedule of a training of `length` steps or epochs (the unit is `spec.interval`).

    The learning rate is constant if `spec` is None.
    """
    if spec is None:
        return LambdaLR(optimizer, lambda t: 1.0)
    if spec.period is not None:
        factors = _compute_period_factors(
            spec.model_copy(update={"period": None}), spec.period, optimizer.param_groups[0]["lr"]
        )
        return LambdaLR(optimizer, lambda t: factors[t % len(factors)])
    arguments = spec.arguments()
    if spec.name == "hyperbolic":
        t0, gamma = float(arguments["t0"]), float(arguments["gamma"])
        return LambdaLR(optimizer, lambda t: 1.0 / (1.0 + gamma * max(0.0, t - t0)))
    return _build_torch_schedule(SCHEDULES[spec.name], arguments, optimizer, length)


def _build_torch_schedule(
    cls: type[LRScheduler], arguments: dict[str, Any], optimizer: torch.optim.Optimizer, length: int
) -> LRScheduler:
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


def _compute_period_factors(spec: ScheduleSpec, period: int, lr: float) -> list[float]:
    """Returns the learning rates of the first `period` steps or epochs as multiples of the optimiser's `lr`."""
    optimizer = _build_dummy(torch.optim.SGD, lr=lr, momentum=0.9)
    schedule, factors = build_schedule(spec, optimizer, period), []
    for _ in range(period):
        factors.append(float(optimizer.param_groups[0]["lr"]) / lr)
        optimizer.step()
        schedule.step()
    return factors


def _build_dummy(cls: type[torch.optim.Optimizer], **arguments: Any) -> torch.optim.Optimizer:
    """Builds an optimiser over one parameter whose steps change nothing. Its arguments are checked as `cls` does.

    The wrapper of `add_param_group`, which excludes the method from compilation, imports torch._dynamo: more than a
    second for a parameter that is never trained. A subclass has the method without its wrapper.
    """
    members = {"add_param_group": inspect.unwrap(cls.add_param_group), "step": lambda self, closure=None: None}
    dummy: Any = type(cls.__name__, (cls,), members)
    built: torch.optim.Optimizer = dummy([torch.nn.Parameter(torch.zeros(1))], **arguments)
    return built
