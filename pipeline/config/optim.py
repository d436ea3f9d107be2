"""Optimisers and schedules from torch, by name. The config is checked by building them once over a dummy parameter."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from firstlight.pipeline.errors import suggest_valid

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "Muon", "SparseAdam")
}
_NEED_FUNCTIONS = ("LambdaLR", "MultiplicativeLR", "SequentialLR")
SCHEDULES: dict[str, type[LRScheduler]] = {
    name: cls
    for name, cls in vars(torch.optim.lr_scheduler).items()
    if isinstance(cls, type) and issubclass(cls, LRScheduler) and name.endswith("LR") and name not in _NEED_FUNCTIONS
}
SCHEDULES["ReduceLROnPlateau"] = ReduceLROnPlateau  # of the training loss
RATES = ("max_lr", "base_lr")  # parameters that are learning rates themselves, in the place of the optimiser's
LENGTHS = ("T_max", "total_steps")  # parameters that mean "the whole training" when they are left out


class _Named(BaseModel):
    """A name and the keyword arguments of the torch class of that name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str

    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def check_arguments(self, cls: type) -> None:
        known = [p for p in inspect.signature(cls).parameters if p not in ("params", "optimizer", "lr", "last_epoch")]
        for key in self.arguments():
            if key not in known:
                raise ValueError(f"{key} is not a parameter of {self.name}; {suggest_valid(key, known)}")


class Optimizer(_Named):
    """A class of `torch.optim`: `name`, `lr`, and its other parameters under torch's names."""

    lr: float = Field(gt=0.0)

    @model_validator(mode="after")
    def _builds(self) -> "Optimizer":
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name {self.name!r} is unknown; {suggest_valid(self.name, OPTIMIZERS)}")
        self.check_arguments(OPTIMIZERS[self.name])
        try:
            build_optimizer(self, [(1.0, [torch.nn.Parameter(torch.zeros(1))])])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} refuses {self.arguments()}: {error}") from None
        return self


class Schedule(_Named):
    """A class of `torch.optim.lr_scheduler`, or `hyperbolic`: lr / (1 + gamma * max(0, t - t0)) (NAT, section 3.3).

    `interval` is what t counts. A length (T_max, total_steps) left out is the whole training, or the whole period. With a `period`, the schedule
    starts again from its beginning every so many t (the rounds of Super-AND). ReduceLROnPlateau looks at the mean training loss of an interval.
    """

    interval: Literal["step", "epoch"] = "step"
    period: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _builds(self) -> "Schedule":
        if self.name == "hyperbolic":
            if set(self.arguments()) != {"t0", "gamma"}:
                raise ValueError(f"hyperbolic takes t0 and gamma, found {sorted(self.arguments())}")
        elif self.name not in SCHEDULES:
            raise ValueError(f"name {self.name!r} is unknown; {suggest_valid(self.name, [*SCHEDULES, 'hyperbolic'])}")
        else:
            self.check_arguments(SCHEDULES[self.name])
        if self.name == "ReduceLROnPlateau" and self.period is not None:
            raise ValueError("ReduceLROnPlateau follows the loss and takes no period")
        try:
            build_schedule(self, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 100)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} refuses {self.arguments()}: {error}") from None
        return self


def build_optimizer(
    spec: Optimizer, groups: Sequence[tuple[float, Sequence[torch.nn.Parameter]]]
) -> torch.optim.Optimizer:
    """`groups`: factors of `spec.lr`, and the parameters that each holds for."""
    rates = [{"params": list(parameters), "lr": factor * spec.lr} for factor, parameters in groups]
    return OPTIMIZERS[spec.name](rates, lr=spec.lr, **spec.arguments())  # type: ignore[call-arg]


def build_schedule(spec: Schedule | None, optimizer: torch.optim.Optimizer, length: int) -> LRScheduler:
    """The schedule of a training of `length` steps or epochs (in units of `spec.interval`); None keeps the learning rate constant."""
    if spec is None:
        return LambdaLR(optimizer, lambda t: 1.0)
    if spec.period is not None:
        factors = _factors(spec.model_copy(update={"period": None}), spec.period, optimizer.param_groups[0]["lr"])
        return LambdaLR(optimizer, lambda t: factors[t % len(factors)])
    arguments = spec.arguments()
    if spec.name == "hyperbolic":
        t0, gamma = float(arguments["t0"]), float(arguments["gamma"])
        return LambdaLR(optimizer, lambda t: 1.0 / (1.0 + gamma * max(0.0, t - t0)))
    cls = SCHEDULES[spec.name]
    parameters = inspect.signature(cls).parameters
    for key in LENGTHS:
        if key in parameters and key not in arguments:
            arguments[key] = length
    for key in RATES:
        if isinstance(arguments.get(key), float):  # of the first group; the others keep their share of it
            arguments[key] = [
                arguments[key] * group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups
            ]
    return cls(optimizer, **arguments)


def _factors(spec: Schedule, period: int, lr: float) -> list[float]:
    """The learning rates of the first `period` t of a schedule, as multiples of the optimiser's `lr`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    schedule, factors = build_schedule(spec, optimizer, period), []
    for _ in range(period):
        factors.append(float(optimizer.param_groups[0]["lr"]) / lr)
        optimizer.step()
        schedule.step()
    return factors
