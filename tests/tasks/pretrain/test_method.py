"""The contract of methods: hyper-parameters and their defaults stand in the signature of `__init__` only."""

import inspect
from typing import Literal

import pytest

from firstlight.pipeline.config.docstrings import SHARED_MEANINGS, parse_parameter_meanings
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, batch_requirements, build_method, metric_plots
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo
from firstlight.tasks.pretrain.nat import NoiseAsTargets
from firstlight.tasks.pretrain.super_and import SuperAnd
from tests.support.learners import build_encoder


@pytest.mark.parametrize("name", METHODS)
def test_docstring_of_the_class_describes_every_keyword(name: str) -> None:
    text, keys = inspect.getdoc(METHODS[name]), METHODS[name].complete_parameters({}).keys()
    described = {key for key in keys if f"\n`{key}`: " in str(text)}
    assert keys - described <= SHARED_MEANINGS.keys()
    meanings = parse_parameter_meanings([text], keys)
    assert [key for key in keys if not meanings[key].endswith((".", ".)"))] == [], "a line begins with a backtick"


def test_given_parameters_replace_defaults() -> None:
    complete = NoiseAsTargets.complete_parameters({"dim": 6})
    assert (complete["dim"], complete["permutation_period"]) == (6, 3)


def test_unknown_parameter_is_named_with_the_valid_ones() -> None:
    with pytest.raises(TypeError, match=r"NoiseAsTargets .*'dimension'.*valid: .*'dim'"):
        NoiseAsTargets.complete_parameters({"dimension": 6})


def test_changed_default_reaches_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slower(NoiseAsTargets):
        def __init__(self, encoder: Encoder, info: TrainingInfo, *, permutation_period: int = 7) -> None:
            super().__init__(encoder, info, permutation_period=permutation_period)

    class FewRounds(SuperAnd):
        def __init__(
            self,
            encoder: Encoder,
            info: TrainingInfo,
            *,
            rounds: int = 2,
            neighbours: bool = True,
            aug: bool = False,
            views: Literal[1, 2] = 1,
            variant: Literal["paper", "reference"] = "paper",
        ) -> None:
            super().__init__(encoder, info, rounds=rounds, neighbours=neighbours, aug=aug, views=views, variant=variant)

    monkeypatch.setitem(METHODS, "nat", Slower)
    monkeypatch.setitem(METHODS, "super_and", FewRounds)
    assert [plot.every for plot in metric_plots("nat", 14, {})] == [7]
    assert [plot.every for plot in metric_plots("super_and", 14, {})] == [7]
    assert batch_requirements("super_and", {}) == BatchRequirements(views=1)


def test_method_is_built_with_its_defaults() -> None:
    method = build_method("super_and", build_encoder({}, 8), TrainingInfo(size=16, epochs=10, seed=0), {"dim": 6})
    assert isinstance(method, SuperAnd)
    assert (method.rounds, method.bank.values.shape) == (5, (16, 6))


def test_method_without_hooks_requires_one_view_and_has_no_plots() -> None:
    assert Method.requirements({}) == BatchRequirements(views=1, labels=False)
    assert Method.plots(4, {}) == ()
