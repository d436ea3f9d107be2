"""Filters are drawn of stages that have some, and those of all stages in one figure if several have."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.publish import filters as module
from firstlight.pipeline.report.publish.filters import add_filter_comparison, add_filters
from firstlight.pipeline.stages.pictures import FILTERS_FILE, PRETRAINED_FILTERS, save_filters
from firstlight.pipeline.stages.stage import StageInstance
from tests.support import recipes


class TitleLog:
    """Keeps the titles of figures."""

    def __init__(self) -> None:
        self.titles: dict[str, str] = {}

    def add(self, name: str, figure: Figure, title: str) -> None:
        self.titles[name] = title


class Drawn:
    """Keeps what is drawn: the networks and whether a fixed filter is before them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.networks: dict[str, list[np.ndarray]] = {}
        self.composed = False
        monkeypatch.setattr(module, "draw_filters", self._draw)

    def _draw(self, networks: dict[str, list[np.ndarray]], composed: bool) -> Figure:
        self.networks, self.composed = networks, composed
        return Figure()


def instance(folder: Path, stage: str, networks: dict[str, float], seed: int = 0) -> StageInstance:
    """An instance whose networks have filters of one value."""
    made = StageInstance(stage, seed, "f", folder / f"{stage}{seed}")
    made.folder.mkdir()
    filters = {name: [torch.full((2, 1, 3, 3), value)] for name, value in networks.items()}
    save_filters(filters, made.folder / FILTERS_FILE)
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipes.recipe(tmp_path, seeds=[4, 5])


def added(recipe: Recipe, one: StageInstance) -> dict[str, str]:
    figure_log: Any = TitleLog()
    add_filters(figure_log, recipe, one)
    return dict(figure_log.titles)


def test_one_network_has_no_name_and_several_have_theirs(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Drawn(monkeypatch)
    assert added(recipe, instance(tmp_path, "pretrain", {PRETRAINED_FILTERS: 1.0})) == {
        "filters": "filters of the first convolution"
    }
    assert list(drawn.networks) == [""]
    assert added(recipe, instance(tmp_path, "finetune", {"pretrained": 1.0, "scratch": 2.0}))
    assert list(drawn.networks) == ["pretrained", "scratch"]
    assert not drawn.composed


def test_stage_without_filters_has_no_figure(tmp_path: Path, recipe: Recipe) -> None:
    assert added(recipe, instance(tmp_path, "finetune", {})) == {}


@pytest.mark.parametrize("kind", ["sobel", "high_pass", "rgb_sobel"])
def test_fixed_filter_of_the_input_is_mentioned(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    recipe = recipes.recipe(tmp_path, encoder__input=kind)
    titles = added(recipe, instance(tmp_path, "pretrain", {PRETRAINED_FILTERS: 1.0}))
    assert "as they act on the image" in titles["filters"]
    assert drawn.composed


def test_filters_of_all_stages_are_compared_for_the_first_seed(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, figure_log = Drawn(monkeypatch), TitleLog()
    supervised = [instance(tmp_path, "supervised", {"scratch": 10.0 + seed}, seed) for seed in (4, 5)]
    nat = [instance(tmp_path, "pretrain", {PRETRAINED_FILTERS: 20.0 + seed}, seed) for seed in (4, 5)]
    without = instance(tmp_path, "evaluate", {}, 4)
    compared: Any = figure_log
    add_filter_comparison(compared, recipe, [*supervised, *nat, without])
    assert {name: float(found[0].mean()) for name, found in drawn.networks.items()} == {
        "supervised, scratch": 14.0,
        "pretrain": 24.0,
    }
    assert "of all stages" in figure_log.titles["filters"]


def test_arms_of_one_stage_are_not_compared_again(tmp_path: Path, recipe: Recipe) -> None:
    figure_log: Any = TitleLog()
    one = instance(tmp_path, "finetune", {"pretrained": 1.0, "scratch": 2.0}, 4)
    add_filter_comparison(figure_log, recipe, [one, instance(tmp_path, "evaluate", {}, 4)])
    assert figure_log.titles == {}
