"""Times of a training: steps that count, and both ways of taking them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.timed_training import (
    StepRate,
    TimedTraining,
    call_in_turns,
    make_timed_recipe,
    write_noise_photographs,
)

CPU = torch.device("cpu")


def build_training(tmp_path: Path, **stage: Any) -> TimedTraining:
    recipe = make_timed_recipe(
        write_noise_photographs(tmp_path / "images", 24, 16),
        tmp_path,
        size=16,
        encoder={"name": "convnet", "width": 4, "depth": 2},
        stage={
            "method": {"name": "simclr", "dim": 8},
            "batch_size": 8,
            "steps": 6,
            "log_every": 2,
            "optimizer": {"name": "SGD", "lr": 0.01},
            **stage,
        },
        stream={"resident": "off"},
        augment=[{"op": "random_shift", "padding": 1}],
        dataset={},
    )
    return TimedTraining(recipe, CPU)


def test_loop_and_bare_step_have_rates(tmp_path: Path) -> None:
    training = build_training(tmp_path)
    loop = training.measure_loop(warmup=2)
    bare, flops = training.measure_bare_step(steps=2, warmup=1)
    for rate in (loop, bare):
        assert rate.images_per_s > 0
        assert rate.images_per_cpu_s > 0
        assert rate.peak_bytes == 0
    assert 0 <= loop.data_wait <= 1
    # Three times the products of a first convolution of 3 x 3 on two views are a lower bound.
    assert flops > 3 * 2 * 2 * 16 * 16 * 4 * 3 * 9 / 2


def test_first_steps_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read twice: 4 of the 6 steps of 8 images take one second."""
    import bench.timed_training as timed

    ticks = iter([100.0, 101.0])
    monkeypatch.setattr(timed.time, "perf_counter", lambda: next(ticks))
    clock = timed._StepClock(CPU, 2, 6)
    for step in range(1, 7):
        clock.look(step)
    assert clock.compute_rate(8, 0.0).images_per_s == 32.0


def test_arms_take_turns() -> None:
    order: list[str] = []
    arms = {name: (lambda name=name: order.append(name) or StepRate(1.0, 1.0)) for name in "ab"}
    assert {name: len(rates) for name, rates in call_in_turns(arms, 2).items()} == {"a": 2, "b": 2}
    assert order == ["a", "b", "a", "b"]
