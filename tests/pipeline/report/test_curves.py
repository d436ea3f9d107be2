"""Figures of numbers: which rows reach which line."""

from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.report import curves
from firstlight.tasks.visuals import Plot


def rows(count: int = 20, per_epoch: int = 5, **more: Any) -> list[dict[str, Any]]:
    """`more`: functions of the step, None: the row has no such number."""
    found = []
    for step in range(1, count + 1):
        row = {
            "step": step,
            "of": count,
            "epoch": (step - 1) // per_epoch,
            "steps_per_epoch": per_epoch,
            "time": 0.0,
            "loss": 1 / step,
            "images_per_s": 9.0,
            "lr": 0.1,
        }
        made = {name: function(step) for name, function in more.items()}
        found.append({**row, "data_wait": 0.1, **{name: value for name, value in made.items() if value is not None}})
    return found


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_the_loss_has_a_panel_and_every_term_one_of_its_own() -> None:
    figure = curves.plot_loss(
        rows(
            term=lambda k: k,
            rare=lambda k: 5.0 if k == 10 else None,
            watch_knn=lambda k: 0.5,
            time_forward=lambda k: 0.2,
        )
    )
    assert titles(figure) == ["loss", "term", "rare"], "no speed, no time, nothing that was looked at"
    loss, term, rare = figure.axes
    np.testing.assert_allclose(loss.lines[0].get_xdata(), np.arange(1, 21) / 5, err_msg="epochs")
    assert term.lines[0].get_ydata().tolist() == list(range(1, 21))
    assert (rare.lines[0].get_xdata().tolist(), rare.lines[0].get_ydata().tolist()) == ([2.0], [5.0])


@pytest.mark.parametrize(("count", "per_epoch"), [(7, 3), (8, 3), (2, 5), (9, 3)])
def test_values_of_a_partial_epoch_are_drawn_at_a_fraction(count: int, per_epoch: int) -> None:
    line = curves.plot_loss(rows(count, per_epoch)).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, count + 1) / per_epoch)


@pytest.mark.parametrize(("count", "marker"), [(1, "o"), (2, "None")])
def test_single_value_is_drawn_as_a_point(count: int, marker: str) -> None:
    """A training of one logged step, as trials are; a line needs two values."""
    assert curves.plot_loss(rows(count)).axes[0].lines[0].get_marker() == (marker if count == 1 else "")
    arms = curves.plot_arm_losses({"rate 1": {"pretrained": rows(count), "scratch": rows(count)}}).axes[0].lines
    assert [line.get_marker() for line in arms] == [marker, marker]


def test_many_values_have_their_running_mean() -> None:
    figure = curves.plot_loss(rows(120, 30, term=lambda k: float(k % 2)))
    faint, mean = figure.axes[1].lines
    assert len(faint.get_ydata()) == 120
    np.testing.assert_allclose(mean.get_ydata(), 0.5)


def test_observed_values_are_drawn_at_their_epochs() -> None:
    assert curves.plot_feature_metrics(rows()) is None
    figure = curves.plot_feature_metrics(
        rows(watch_rankme=lambda k: 3.0 if k % 10 == 0 else None, watch_knn=lambda k: k / 20 if k % 10 == 0 else None)
    )
    assert figure is not None
    assert titles(figure) == ["kNN accuracy", "effective rank"]
    assert (figure.axes[0].lines[0].get_xdata().tolist(), figure.axes[0].lines[0].get_ydata().tolist()) == (
        [2.0, 4.0],
        [0.5, 1.0],
    )


def test_a_period_has_the_last_value_that_was_logged_in_it() -> None:
    curve = Plot("rounds", "by round", ("consistency", "nowhere"), 2, "round")
    figure = curves.plot_periods(rows(consistency=lambda k: k / 20 if k > 10 else None), curve)
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_xlabel() == "round"
    assert (axis.lines[0].get_xdata().tolist(), axis.lines[0].get_ydata().tolist()) == ([2], [1.0]), (
        "nothing was logged in the first round"
    )
    assert curves.plot_periods(rows(), curve) is None


def test_the_parts_of_a_step_and_the_rest_fill_the_whole() -> None:
    figure = curves.plot_speed(rows(time_forward=lambda k: 0.5, time_data=lambda k: 0.2, time_tables=lambda k: 0.0))
    shares = figure.axes[2]
    assert [text.get_text() for text in shares.get_legend().get_texts()] == ["other", "forward", "data"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in shares.collections]
    assert tops == pytest.approx([0.2, 0.7, 1.0])


def test_shares_that_overlap_leave_no_rest() -> None:
    """The shares may overlap on a GPU, which works while its process waits."""
    figure = curves.plot_speed(rows(time_forward=lambda k: 0.8, time_data=lambda k: 0.5))
    assert figure.axes[2].get_ylim() == (0.0, 1.0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_training_of_a_step_or_two_has_figures(count: int) -> None:
    for figure in (curves.plot_loss(rows(count)), curves.plot_speed(rows(count))):
        figure.canvas.draw()
        assert figure.axes[0].lines


def test_losses_of_all_arms_are_lines_of_one_panel_for_each_setting() -> None:
    """A panel is like figure 3 of arXiv 1611.09119: it has every arm at the same learning rate."""
    slow, fast = rows(10), rows(20)
    trainings = {"learning rate 0.1": {"pretrained": fast, "he": slow}, "learning rate 1": {"pretrained": slow}}
    left, right = curves.plot_arm_losses(trainings).axes
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == tuple(
        f"training loss, {one}" for one in trainings
    )
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["pretrained", "he"]
    first, second = left.lines
    assert (first.get_xdata().tolist(), second.get_xdata().tolist()) == (
        [k / 5 for k in range(1, 21)],
        [k / 5 for k in range(1, 11)],
    )
    assert first.get_ydata().tolist() == [1 / k for k in range(1, 21)]
    assert first.get_color() != second.get_color()
    assert len(right.lines) == 1


def test_progress_is_the_mean_over_seeds_against_passes_and_seconds() -> None:
    two, small = (rows(20, 5, watch_knn=lambda k, s=s: (k / 100 + s) if k % 5 == 0 else None) for s in (0.0, 0.2))
    trainings = {
        "simclr": [curves.LoggedTraining(two, 9, 2.0), curves.LoggedTraining(small, 9, 2.0)],
        "nat": [curves.LoggedTraining(two, 18, 1.0)],
        "dae": [curves.LoggedTraining(rows(4), 9, 1.0)],
    }
    figure = curves.plot_progress(trainings)
    assert figure is not None
    by_passes, by_seconds = figure.axes
    assert [line.get_label() for line in by_passes.lines] == ["simclr", "nat"], "dae has logged no kNN accuracy"
    simclr, nat = by_passes.lines
    np.testing.assert_allclose(simclr.get_xdata(), np.array([5, 10, 15, 20]) * 9 * 2)
    np.testing.assert_allclose(simclr.get_ydata(), np.array([5, 10, 15, 20]) + 10)
    np.testing.assert_allclose(nat.get_xdata(), np.array([5, 10, 15, 20]) * 18)
    # 9 images a second.
    np.testing.assert_allclose(by_seconds.lines[0].get_xdata(), [5, 10, 15, 20])
    np.testing.assert_allclose(by_seconds.lines[1].get_xdata(), [10, 20, 30, 40])


def test_progress_is_against_cpu_seconds_where_all_trainings_have_logged_them() -> None:
    measured = rows(20, 5, watch_knn=lambda k: k / 100 if k % 5 == 0 else None, images_per_cpu_s=lambda k: 18.0)
    trainings = {name: [curves.LoggedTraining(measured, 9, 1.0)] for name in ("simclr", "nat")}
    figure = curves.plot_progress(trainings)
    assert figure is not None
    assert figure.axes[1].get_xlabel() == "CPU seconds"
    np.testing.assert_allclose(np.asarray(figure.axes[1].lines[0].get_xdata()), [2.5, 5, 7.5, 10])
    on_gpu = rows(20, 5, watch_knn=lambda k: k / 100 if k % 5 == 0 else None)
    figure = curves.plot_progress({**trainings, "dae": [curves.LoggedTraining(on_gpu, 9, 1.0)]})
    assert figure is not None
    assert figure.axes[1].get_xlabel() == "seconds"
    np.testing.assert_allclose(np.asarray(figure.axes[1].lines[0].get_xdata()), [5, 10, 15, 20])


def test_lines_of_progress_are_in_the_order_of_their_ends() -> None:
    low, high = (rows(20, 5, watch_knn=lambda k, end=end: end if k % 5 == 0 else None) for end in (0.3, 0.5))
    trainings = {"nat": low, "simclr": high, "dae": low}
    figure = curves.plot_progress({name: [curves.LoggedTraining(one, 9, 1.0)] for name, one in trainings.items()})
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == ["simclr", "nat", "dae"]


def test_progress_of_one_stage_is_not_drawn() -> None:
    alone = [curves.LoggedTraining(rows(20, 5, watch_knn=lambda k: 0.5), 9, 1.0)]
    assert curves.plot_progress({"nat": alone, "dae": [curves.LoggedTraining(rows(4), 9, 1.0)]}) is None


def test_seed_that_has_not_ended_is_left_out_of_the_mean() -> None:
    whole, part = (rows(n, 5, watch_knn=lambda k: k / 100 if k % 5 == 0 else None) for n in (20, 10))
    seeds = [curves.LoggedTraining(whole, 9, 1.0), curves.LoggedTraining(part, 9, 1.0)]
    figure = curves.plot_progress({"nat": seeds, "dae": seeds[:1]})
    assert figure is not None
    assert len(np.asarray(figure.axes[0].lines[0].get_xdata())) == 4


def test_a_training_whose_log_is_lost_has_figures() -> None:
    panels = ["images per second", "learning rate", "parts of the time of a step"]
    for figure, wanted in ((curves.plot_loss([]), ["loss"]), (curves.plot_speed([]), panels)):
        figure.canvas.draw()
        assert titles(figure) == wanted
        assert not any(len(line.get_xdata()) for axis in figure.axes for line in axis.lines)
