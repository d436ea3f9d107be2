"""The figures of a search: which are drawn, and what they show."""

from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from firstlight.pipeline.search import figures
from firstlight.pipeline.search.figures import compute_importances, draw_figures
from firstlight.pipeline.search.ledger import Segment
from firstlight.pipeline.search.space import Search
from tests.support.searches import LR, PERIOD, done_trial, make_search, make_trials

TWO = [{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}]


def ink_share(figure: Figure) -> float:
    """Returns the share of the pixels that are not white."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return float((pixels != 255).any(-1).mean())


def test_figures_of_one_objective() -> None:
    search = make_search()
    found = draw_figures(search, make_trials(search, 20))
    assert set(found) == {"objective", "importance", "parallel"}
    assert all(ink_share(figure) > 0.01 for figure in found.values())


def test_figures_of_two_objectives() -> None:
    search = make_search(objectives=TWO)
    found = draw_figures(search, make_trials(search, 20, seeds=3))
    assert set(found) == {
        "objective",
        "importance",
        "objective_pretrain.loss",
        "importance_pretrain.loss",
        "parallel",
        "pareto",
    }
    assert all(ink_share(figure) > 0.01 for figure in found.values())


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_trials_have_no_importance(count: int) -> None:
    search = make_search(objectives=TWO)
    assert "importance" not in draw_figures(search, make_trials(search, count))


def test_failed_trials_alone_have_no_figures() -> None:
    search = make_search()
    trials = [trial for trial in make_trials(search, 20) if trial.state == "failed"]
    assert draw_figures(search, trials) == {}


def test_setting_that_decides_has_the_largest_importance() -> None:
    search = make_search()
    shares = compute_importances(search, make_trials(search, 30))
    assert shares[LR] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)


def test_best_so_far_never_gets_worse() -> None:
    search = make_search(objectives=[{"measure": "pretrain.loss", "mode": "min"}])
    trials = [done_trial(k, {LR: 0.1, PERIOD: 1}, value) for k, value in enumerate((0.5, 0.7, 0.3, 0.4))]
    axis = figures.draw_history(trials, search.objectives[0]).axes[0]
    (best,) = [line for line in axis.lines if line.get_label() == "the best so far"]
    assert np.asarray(best.get_ydata()).tolist() == [0.5, 0.5, 0.3, 0.3]


def read_legend(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def grid_search(space: dict[str, Any], **changes: Any) -> Search:
    return make_search(space=space, algorithm="grid", trials=None, **changes)


def test_curve_has_means_and_a_line_for_each_value_of_the_second_key() -> None:
    search = grid_search({PERIOD: {"grid": [3, 1, 2]}, LR: {"grid": [0.1, 0.2]}})
    trials = [
        done_trial(k, values, values[PERIOD] + values[LR], seeds=3) for k, values in enumerate(search.grid_points())
    ]
    figure = draw_figures(search, trials)["curve"]
    (axis,) = figure.axes
    assert read_legend(axis) == ["lr 0.1", "lr 0.2"]
    line = axis.containers[0].lines[0]  # type: ignore[attr-defined]
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata() == pytest.approx([1.11, 2.11, 3.11])
    assert ink_share(figure) > 0.01


def test_several_objectives_of_one_key_share_a_curve() -> None:
    search = grid_search(
        {"stages.finetune.labels_per_class": {"grid": [10, 20, 400]}},
        objectives=[{"measure": "f.pretrained"}, {"measure": "f.scratch"}],
    )
    trials = [done_trial(k, values, 0.8, 0.6) for k, values in enumerate(search.grid_points())]
    (axis,) = draw_figures(search, trials)["curve"].axes
    assert read_legend(axis) == ["f.pretrained", "f.scratch"]
    assert axis.get_xscale() == "log"


def test_words_are_placed_in_the_order_of_the_grid() -> None:
    search = grid_search({"stages.pretrain.method.shortcuts": {"grid": ["none", "full"]}})
    trials = [done_trial(k, values, 0.5 + 0.1 * k) for k, values in enumerate(search.grid_points())]
    found = draw_figures(search, trials)
    assert [label.get_text() for label in found["curve"].axes[0].get_xticklabels()] == ["none", "full"]
    assert ink_share(found["parallel"]) > 0.01


def test_population_is_drawn_over_epochs() -> None:
    """Values at 3, 6 and 9 epochs; the second trial copies the networks of the first at 6."""
    search = make_search(algorithm="random", scheduler={"name": "pbt", "measure": "pretrain.loss", "interval": 3})
    trials = [
        done_trial(k, {LR: 0.2 + 0.1 * k, PERIOD: 1}, 0.5 + 0.1 * k, seen=[(3.0, 0.1), (6.0, 0.2 + k), (9.0, 0.3 + k)])
        for k in range(2)
    ]
    for trial in trials:
        trial.parts = [Segment(epochs, {LR: 0.1 * epochs, PERIOD: 1}, 0.1, None) for epochs in (3, 6)]
    trials[1].origin = 0
    figure = draw_figures(search, trials)["population"]
    assert ink_share(figure) > 0.01
    values, rate = figure.axes
    curves = [line for line in values.lines if line.get_marker() == "None"]
    (ring,) = [line for line in values.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in curves] == [[0.1, 0.2, 0.3], [0.1, 1.2, 1.3]], "the best on top"
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([6], [1.2])
    assert [list(line.get_xdata()) for line in rate.lines] == [[0, 3, 6, 9]] * 2
    assert list(rate.lines[0].get_ydata()) == pytest.approx([0.3, 0.3, 0.6, 0.2])
