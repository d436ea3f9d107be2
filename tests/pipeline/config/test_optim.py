"""Optimisers and schedules by name: checks, learning rates, checkpoints."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim.lr_scheduler import LRScheduler

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.optim import (
    OWN_SCHEDULES,
    OptimizerSpec,
    ScheduleSpec,
    build_optimizer,
    build_schedule,
    list_optimizers,
    list_schedules,
    list_timm_optimizers,
)
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.train.checkpoint import pack_state, unpack_state
from tests.support import recipes

LENGTH = 12
NEEDED: dict[str, dict[str, Any]] = {  # arguments without a default
    "StepLR": {"step_size": 5},
    "MultiStepLR": {"milestones": [3, 7], "gamma": 0.5},
    "ExponentialLR": {"gamma": 0.9},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.3},
    "hyperbolic": {"t0": 4, "gamma": 0.3},
    "partial_cosine": {"cycles": 0.4375},
}
NAMES = [
    *(name for name in list_schedules() if name != "ReduceLROnPlateau"),
    *OWN_SCHEDULES,
]  # the plateau is followed in test_fit.py


def sgd(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def spec(name: str, **arguments: Any) -> ScheduleSpec:
    return ScheduleSpec.model_validate({"name": name, **NEEDED.get(name, {}), **arguments})


def rates(schedule: LRScheduler, steps: int) -> list[float]:
    """The learning rates of the next steps."""
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("t0", "gamma"), [(0, 1.0), (4, 0.3), (100, 0.3)])
def test_hyperbolic_follows_the_papers_formula(t0: int, gamma: float) -> None:
    schedule = build_schedule(spec("hyperbolic", t0=t0, gamma=gamma), sgd(0.7), LENGTH)
    assert rates(schedule, LENGTH) == pytest.approx(
        [0.7 / (1 + gamma * max(0, t - t0)) for t in range(LENGTH)], rel=1e-12
    )


@pytest.mark.parametrize("arguments", [{}, {"t0": 1}, {"t0": 1, "gamma": 0.1, "T_max": 3}])
def test_hyperbolic_takes_its_two_constants(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="hyperbolic takes t0 and gamma"):
        ScheduleSpec.model_validate({"name": "hyperbolic", **arguments})


def test_cosine_of_7_sixteenths_is_the_schedule_of_fixmatch() -> None:
    schedule = build_schedule(spec("partial_cosine", cycles=7 / 16), sgd(0.03), LENGTH)
    expected = [0.03 * math.cos(7 * math.pi * k / (16 * LENGTH)) for k in range(LENGTH)]
    assert rates(schedule, LENGTH) == pytest.approx(expected, rel=1e-12)


def test_cosine_stays_at_0_after_its_first_root() -> None:
    found = rates(build_schedule(spec("partial_cosine", cycles=2), sgd(), LENGTH), LENGTH)
    assert found == pytest.approx([0.1, 0.1 * math.cos(math.pi / 6), 0.05, *[0.0] * 9], rel=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"cycles": 0.5, "T_max": 3}])
def test_cosine_takes_its_cycles(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="cosine takes cycles"):
        ScheduleSpec.model_validate({"name": "partial_cosine", **arguments})


def test_rate_is_constant_without_a_schedule() -> None:
    assert rates(build_schedule(None, sgd(), LENGTH), LENGTH) == [0.1] * LENGTH


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_lasts_for_the_whole_training(name: str) -> None:
    found = rates(build_schedule(spec(name), sgd(), LENGTH), LENGTH)
    assert all(rate >= 0 for rate in found)
    assert len(set(found)) > 1 or name == "ConstantLR"  # its factor, over a length that is the whole training


def test_default_length_is_the_whole_training() -> None:
    cosine, linear, one_cycle = sgd(), sgd(), sgd()
    rates(build_schedule(spec("CosineAnnealingLR"), cosine, LENGTH), LENGTH)
    assert cosine.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    ramp = rates(build_schedule(spec("LinearLR", start_factor=0.5, total_iters=LENGTH), linear, LENGTH), LENGTH)
    assert ramp == pytest.approx([0.1 * (0.5 + 0.5 * t / LENGTH) for t in range(LENGTH)])
    assert linear.param_groups[0]["lr"] == pytest.approx(0.1)
    peak = rates(build_schedule(spec("OneCycleLR", max_lr=0.3, pct_start=0.25), one_cycle, LENGTH), LENGTH)
    assert peak.index(max(peak)) == LENGTH * 0.25 - 1
    assert peak[-1] == min(peak)


def test_given_length_is_kept() -> None:
    found = rates(build_schedule(spec("CosineAnnealingLR", T_max=4), sgd(), LENGTH), LENGTH)
    assert found[4] == pytest.approx(0, abs=1e-12)
    assert found[8] == pytest.approx(0.1)


@pytest.mark.parametrize("stop", [1, 5, LENGTH - 1])
@pytest.mark.parametrize("name", [*NAMES, None])
def test_schedule_continues_from_a_checkpoint(name: str | None, stop: int) -> None:
    its = None if name is None else spec(name)
    whole = rates(build_schedule(its, sgd(), LENGTH), LENGTH)
    first = build_schedule(its, sgd(), LENGTH)
    rates(first, stop)
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_state({"optimizer": first.optimizer.state_dict(), "schedule": first.state_dict()}, tensors)
    state = unpack_state(packed, tensors)
    second = build_schedule(its, sgd(), LENGTH)
    second.optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["schedule"])
    assert rates(second, LENGTH - stop) == whole[stop:]


def trained(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, start: int, stop: int) -> torch.Tensor:
    for k in range(start, stop):
        optimizer.zero_grad()
        (weight - k).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", [*list_optimizers(), *list_timm_optimizers()])
def test_every_optimizer_continues_from_a_checkpoint(name: str) -> None:
    its = OptimizerSpec(name=name, lr=0.1)
    start = torch.arange(6.0).view(2, 3)
    one, two = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    whole = trained(one, build_optimizer(its, [(1.0, [one])], 0.1), 0, 6)
    first = build_optimizer(its, [(1.0, [two])], 0.1)
    half = trained(two, first, 0, 3)
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_state(first.state_dict(), tensors)
    again = torch.nn.Parameter(half.clone())
    second = build_optimizer(its, [(1.0, [again])], 0.1)
    second.load_state_dict(unpack_state(packed, tensors))
    assert torch.equal(trained(again, second, 3, 6), whole)
    assert not torch.equal(half, start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages__pretrain__optimizer__name": "SDG"},
            r"stages.pretrain.optimizer: name 'SDG' is unknown; did you mean 'SGD'\?",
        ),
        (
            {"stages__pretrain__optimizer__momentun": 0.9},
            r"momentun is not a parameter of SGD; did you mean 'momentum'\?",
        ),
        ({"stages__pretrain__optimizer__momentum": -1.0}, r"SGD refuses .*'momentum': -1.0.*Invalid momentum value"),
        ({"stages__pretrain__optimizer__lr": 0.0}, r"stages.pretrain.optimizer.lr: 0.0 is not valid"),
        (
            {"stages__pretrain__schedule__name": "CosineLR"},
            r"stages.pretrain.schedule: name 'CosineLR' is unknown; did you mean",
        ),
        ({"stages__pretrain__schedule": {"name": "StepLR"}}, r"StepLR refuses {}.*step_size"),
        (
            {"stages__pretrain__schedule__T_mx": 3},
            r"T_mx is not a parameter of CosineAnnealingLR; did you mean 'T_max'\?",
        ),
    ],
)
def test_wrong_optimizer_or_schedule_is_named(tmp_path: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipes.recipe(tmp_path, **changes)


def test_classes_that_a_recipe_cannot_use_are_unknown() -> None:
    """They need functions, a closure, or only 2-dimensional weights."""
    for name in ("LBFGS", "Muon", "SparseAdam", "Optimizer"):
        with pytest.raises(UserError, match="is unknown"):
            parse_recipe(
                {
                    **recipes.RECIPE,
                    "stages": {
                        "pretrain": {**recipes.RECIPE["stages"]["pretrain"], "optimizer": {"name": name, "lr": 0.1}}
                    },
                }
            )
    assert not {"LambdaLR", "MultiplicativeLR", "SequentialLR"} & set(list_schedules())


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "MultiStepLR", "milestones": [6, 8], "gamma": 0.1},
        {"name": "CosineAnnealingLR", "eta_min": 0.01},
        {"name": "OneCycleLR", "max_lr": 0.3, "total_steps": 11},
        {"name": "hyperbolic", "t0": 3, "gamma": 0.5},
    ],
)
def test_period_repeats_the_schedule(arguments: dict[str, Any]) -> None:
    once = rates(build_schedule(ScheduleSpec(**arguments), sgd(), 10), 10)
    again = rates(build_schedule(ScheduleSpec(**arguments, period=10), sgd(), 35), 35)
    assert again == pytest.approx([*once, *once, *once, *once[:5]], rel=1e-12)
    assert len(set(once)) > 1


def test_plateau_takes_no_period() -> None:
    with pytest.raises(ValueError, match="takes no period"):
        ScheduleSpec(name="ReduceLROnPlateau", period=3)


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        {"name": "CosineAnnealingLR"},
        {"name": "OneCycleLR", "max_lr": 0.4},
        {"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.1},
        {"name": "StepLR", "step_size": 2},
    ],
)
def test_parameter_groups_keep_their_ratio_of_rates(schedule: dict[str, object] | None) -> None:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = build_optimizer(
        OptimizerSpec.model_validate({"name": "SGD", "lr": 0.1, "momentum": 0.9}),
        [(1.0, [weights[0]]), (0.25, [weights[1]])],
        0.1,
    )
    spec = None if schedule is None else ScheduleSpec.model_validate(schedule)
    built = build_schedule(spec, optimizer, 12)
    for _ in range(10):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 4)
        optimizer.step()
        built.step()


@pytest.mark.parametrize(
    ("settings", "batch", "rate"),
    [
        ({"lr": 0.3}, 1024, 0.3),
        ({"base_lr": 0.3}, 256, 0.3),
        ({"base_lr": 0.3}, 1024, 1.2),
        ({"base_lr": 0.3, "scaling": "sqrt"}, 1024, 0.6),
        ({"base_lr": 0.3, "scaling": "sqrt"}, 64, 0.15),
    ],
)
def test_rate_follows_from_the_batch(settings: dict[str, Any], batch: int, rate: float) -> None:
    found = OptimizerSpec(name="SGD", **settings)
    assert found.compute_rate(batch) == pytest.approx(rate)
    assert found.with_rate(0.7).compute_rate(batch) == 0.7


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.0}])
def test_end_of_the_weight_decay_needs_a_start(decay: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="weight_decay_end is not valid without a weight_decay above 0"):
        OptimizerSpec(name="AdamW", lr=0.1, weight_decay_end=0.4, **decay)
    spec = OptimizerSpec(name="AdamW", lr=0.1, weight_decay=0.04, weight_decay_end=0.4)
    assert spec.arguments() == {"weight_decay": 0.04}


@pytest.mark.parametrize("settings", [{}, {"lr": 0.1, "base_lr": 0.1}])
def test_one_rate_is_needed(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs one of lr and base_lr"):
        OptimizerSpec(name="SGD", **settings)


def list_decays(decay_all: bool, weight_decay: float = 0.1, name: str = "AdamW") -> list[tuple[float, float, int]]:
    """(rate, decay, number of parameters) of the groups of a small network in two parts."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 2))
    token = torch.nn.Parameter(torch.zeros(1, 1, 2))
    groups = [(1.0, [*network[2].parameters()]), (0.5, [*network[0].parameters(), *network[1].parameters(), token])]
    keys: dict[str, Any] = {"name": name, "base_lr": 0.4, "weight_decay": weight_decay, "decay_all": decay_all}
    spec = OptimizerSpec(**keys)
    built = build_optimizer(spec, groups, spec.compute_rate(128), [token])
    return [(group["lr"], group["weight_decay"], len(group["params"])) for group in built.param_groups]


@pytest.mark.parametrize("name", ["AdamW", "lamb"])
def test_biases_norms_and_tokens_are_not_decayed(name: str) -> None:
    assert list_decays(False, name=name) == [(0.2, 0.1, 1), (0.2, 0.0, 1), (0.1, 0.1, 1), (0.1, 0.0, 4)]
    assert list_decays(True, name=name) == [(0.2, 0.1, 2), (0.1, 0.1, 5)]
    assert list_decays(False, 0.0, name) == [(0.2, 0.0, 2), (0.1, 0.0, 5)]


@pytest.mark.parametrize("name", ["lamb", "lars", "lion", "adamw", "muon", "sgd"])
def test_timm_optimizer_steps_as_timm_builds_it(name: str) -> None:
    import timm.optim

    start = torch.linspace(-1.0, 1.0, 6).view(2, 3)
    own, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    spec = OptimizerSpec(name=name, lr=0.1, weight_decay=0.01)  # type: ignore[call-arg]
    built = build_optimizer(spec, [(1.0, [own])], 0.1)
    reference = timm.optim.create_optimizer_v2([theirs], name, lr=0.1, weight_decay=0.01)  # type: ignore[attr-defined]
    assert torch.equal(trained(own, built, 0, 3), trained(theirs, reference, 0, 3))
    assert not torch.equal(own, start)


def test_unknown_optimizer_is_named_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match=r"'lambs' is unknown; .*lamb"):
        OptimizerSpec(name="lambs", lr=0.1)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "hyperbolic", "StepLR"])
def test_warmup_rises_linearly_and_the_schedule_follows(name: str) -> None:
    warmed = rates(build_schedule(spec(name, warmup_epochs=1.5), sgd(0.8), LENGTH, epoch_length=2), LENGTH)
    assert warmed[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert warmed[3:] == pytest.approx(rates(build_schedule(spec(name), sgd(0.8), LENGTH - 3), LENGTH - 3))


def test_warmup_restores_from_a_state_and_may_fill_the_training() -> None:
    built = build_schedule(spec("CosineAnnealingLR", warmup_epochs=2), sgd(), 4, epoch_length=3)
    assert rates(built, 4) == pytest.approx([0.02, 0.04, 0.06, 0.08])
    half = build_schedule(spec("CosineAnnealingLR", warmup_epochs=1), sgd(), LENGTH, epoch_length=3)
    first = rates(half, 5)
    again = build_schedule(spec("CosineAnnealingLR", warmup_epochs=1), sgd(), LENGTH, epoch_length=3)
    again.load_state_dict(half.state_dict())
    again.optimizer.load_state_dict(half.optimizer.state_dict())
    whole = rates(build_schedule(spec("CosineAnnealingLR", warmup_epochs=1), sgd(), LENGTH, epoch_length=3), LENGTH)
    assert [*first, *rates(again, LENGTH - 5)] == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "OneCycleLR", "max_lr": 0.1, "warmup_epochs": 1}, "warmup_epochs: 1 is not valid with OneCycleLR"),
        ({"name": "StepLR", "step_size": 1, "interval": "epoch", "warmup_epochs": 0.5}, "valid: a whole number"),
    ],
)
def test_warmup_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleSpec.model_validate(settings)


def test_checking_settings_does_not_import_the_compiler(tmp_path: Path) -> None:
    code = """
import sys
from firstlight.pipeline.config.optim import OptimizerSpec, ScheduleSpec, list_optimizers
for name in list_optimizers():
    OptimizerSpec(name=name, lr=0.1)
ScheduleSpec(name="OneCycleLR", max_lr=0.3, period=5)
ScheduleSpec(name="ReduceLROnPlateau")
print("torch._dynamo" in sys.modules, "torch" in sys.modules)
"""
    # All optimisers are checked if there is no cache.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=environment)
    assert answer.stdout == "False True\n"
