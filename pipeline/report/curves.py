"""Figures of the numbers that a training logs: losses, feature metrics, speed, and the parts of the time of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from firstlight.pipeline.report.figures import BLUE, GRAY, RED, style_axes
from firstlight.pipeline.train.metrics import STEPS_PER_EPOCH_KEY, TIME_PREFIX
from firstlight.tasks.visuals import Plot

MetricRows = Sequence[Mapping[str, float]]
COUNTING_KEYS, MONITOR_PREFIX = ("step", "of", "epoch", STEPS_PER_EPOCH_KEY, "time"), "watch_"
CPU_RATE_KEY = "images_per_cpu_s"
SPEED_KEYS = ("lr", "images_per_s", CPU_RATE_KEY, "data_wait")
STEP_PARTS = ("data", "forward", "backward", "tables", "assignment", "communication", "optimizer", "checkpoint")
STEP_COLOURS = ("#d08c1c", "#2458a6", "#6d9bd8", "#2f8a57", "#8cc49f", "#b3372e", "#7a5aa6", "#5f6b7a", "#cbd2d9")
ARM_COLOURS = (BLUE, "#d08c1c", "#2f8a57", RED, "#7a5aa6", "#5f6b7a", "#6d9bd8")
FEATURE_METRIC_TITLES = {
    "knn": "kNN accuracy",
    "rankme": "effective rank",
    "uniformity": "uniformity (lower: more even)",
    "feature_std": "spread of features",
    "dead_dimensions": "share of dead dimensions",
    "alignment": "alignment of views (lower: closer)",
}
# The number of values from which on a line is drawn through their running mean.
MIN_SMOOTHED_VALUES = 60


def plot_loss(rows: MetricRows) -> Figure:
    """Draws the loss in a large panel, and every other number that a method or task logs in a small one."""
    names = [name for name in _list_logged_names(rows) if _is_loss_term(name) and name != "loss"]
    columns = 2 + min(-(-len(names) // 2), 3) if names else 2
    lines = max(2, -(-len(names) // max(columns - 2, 1)))
    figure = Figure(figsize=(2.7 * columns, 1.9 * lines), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(lines, columns)
    _plot_line(figure.add_subplot(grid[:, :2]), rows, "loss", "epoch")
    for k, name in enumerate(names):
        _plot_line(
            figure.add_subplot(grid[k % lines, 2 + k // lines]),
            rows,
            name,
            "epoch" if k % lines == lines - 1 or k == len(names) - 1 else "",
        )
    return figure


def plot_arm_losses(trainings: Mapping[str, Mapping[str, MetricRows]]) -> Figure:
    """Draws the training losses of several arms over each other: a panel for each setting, a line for each arm.

    `trainings`: by setting, for example a learning rate, the logged rows of each arm.
    """
    figure = Figure(figsize=(5.2 * len(trainings), 3.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(trainings), squeeze=False, sharey=True)[0]
    for axis, (setting, arms) in zip(panels, trainings.items(), strict=True):
        for k, (arm, rows) in enumerate(arms.items()):
            here = [row for row in rows if "loss" in row]
            losses = np.array([row["loss"] for row in here])
            style = {"color": ARM_COLOURS[k % len(ARM_COLOURS)], "linewidth": 1.5, "label": arm}
            # A line through one value is invisible.
            style |= {"marker": "o"} if len(losses) == 1 else {}
            axis.plot(_smooth_values(_count_epochs(here)), _smooth_values(losses), **style)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(frameon=False, fontsize=8)
        style_axes(axis, f"training loss, {setting}")
    return figure


def plot_feature_metrics(rows: MetricRows) -> Figure | None:
    """Draws the metrics of the features of held-out images over epochs. Returns None if none is logged."""
    names = [name for name in _list_logged_names(rows) if name.startswith(MONITOR_PREFIX)]
    if not names:
        return None
    names.sort(key=lambda name: name != f"{MONITOR_PREFIX}knn")
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * lines), layout="constrained", facecolor="white")
    for k, name in enumerate(names):
        axis = figure.add_subplot(lines, columns, k + 1)
        _plot_line(axis, rows, name, "epoch" if k >= len(names) - columns else "", marker="o")
        style_axes(
            axis, FEATURE_METRIC_TITLES.get(name.removeprefix(MONITOR_PREFIX), name.removeprefix(MONITOR_PREFIX))
        )
    return figure


@dataclass(frozen=True)
class LoggedTraining:
    """The logged rows of a training, and what a step of it costs."""

    rows: MetricRows
    # The number of images in a batch.
    batch_size: int
    # The number of passes of an image through the network in a step; a view of half the side counts as a quarter.
    passes_per_image: float

    def read_progress(self, name: str, rate: str) -> tuple[list[float], list[float], list[float]]:
        """Returns passes through the network, seconds of training, and values, where the number `name` was logged.

        The seconds are those of the steps, without evaluations and without the time between a kill and a resume.
        `rate`: the logged number that they are computed from, in images per second.
        """
        passes, seconds, values = list[float](), list[float](), list[float]()
        done, spent = 0.0, 0.0
        for row in self.rows:
            images = (row["step"] - done) * self.batch_size
            spent += images / max(row[rate], 1e-9)
            done = row["step"]
            if name in row:
                passes.append(done * self.batch_size * self.passes_per_image)
                seconds.append(spent)
                values.append(row[name])
        return passes, seconds, values


def plot_progress(trainings: Mapping[str, Sequence[LoggedTraining]]) -> Figure | None:
    """Draws kNN accuracy on held-out images against passes through the network and against seconds of training.

    The seconds are those of CPU time if all trainings have logged them, which only trainings on CPUs do.
    `trainings`: by stage, the trainings of its seeds. A line is the mean over the seeds that have logged all of it. The
    line that ends highest comes first.
    Returns None if fewer than two stages have logged it.
    """
    name, lines = f"{MONITOR_PREFIX}knn", {}
    all_rows = (row for seeds in trainings.values() for training in seeds for row in training.rows)
    rate, unit = ("images_per_s", "seconds")
    if all(CPU_RATE_KEY in row for row in all_rows):
        rate, unit = (CPU_RATE_KEY, "CPU seconds")
    for stage, seeds in trainings.items():
        found = [np.array(training.read_progress(name, rate)) for training in seeds]
        longest = max((points.shape[1] for points in found), default=0)
        if longest:
            lines[stage] = np.mean([points for points in found if points.shape[1] == longest], 0)
    if len(lines) < 2:
        return None
    # The legend has the order of the ends of the lines.
    lines = dict(sorted(lines.items(), key=lambda entry: -entry[1][2, -1]))
    figure = Figure(figsize=(10.5, 4.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, row, label in zip(panels, (0, 1), ("passes of an image through the network", unit), strict=True):
        for k, (stage, points) in enumerate(lines.items()):
            colour, dash = ARM_COLOURS[k % len(ARM_COLOURS)], ("-", "--", ":", "-.")[k // len(ARM_COLOURS) % 4]
            axis.plot(points[row], 100 * points[2], dash, color=colour, marker="o", markersize=3, label=stage)
        axis.set_xlabel(label, fontsize=8)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(labelsize=8)
        style_axes(axis, f"held-out kNN (%) against {label.partition(' of ')[0]}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    return figure


def plot_speed(rows: MetricRows) -> Figure:
    """Draws images per second, the learning rate, and the shares of the parts of a step in its time."""
    figure = Figure(figsize=(9.6, 2.6), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.5])
    _plot_line(left, rows, "images_per_s", "epoch")
    style_axes(left, "images per second")
    left.set_ylim(bottom=0)
    _plot_line(middle, rows, "lr", "epoch")
    style_axes(middle, "learning rate")
    at = _smooth_values(_count_epochs(rows))
    shares = {name: np.array([row.get(TIME_PREFIX + name, 0.0) for row in rows]) for name in STEP_PARTS}
    shares = {name: _smooth_values(values) for name, values in shares.items() if values.max(initial=0) > 0.005}
    rest = np.clip(1.0 - sum(shares.values(), np.zeros_like(at)), 0.0, 1.0)
    colours = [STEP_COLOURS[STEP_PARTS.index(name)] for name in shares]
    right.stackplot(
        at, *shares.values(), rest, labels=[*shares, "other"], colors=[*colours, STEP_COLOURS[-1]], linewidth=0
    )
    right.set(ylim=(0, 1), xmargin=0)
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.set_xlabel("epoch", fontsize=8)
    right.tick_params(labelsize=8)
    style_axes(right, "parts of the time of a step")
    return figure


def plot_periods(rows: MetricRows, curve: Plot) -> Figure | None:
    """Draws the last value of each number of `curve` in each period. Returns None if none of them is logged."""
    names = [name for name in curve.numbers if any(name in row for row in rows)]
    if not names:
        return None
    figure = Figure(figsize=(3.4 * len(names) + 0.6, 2.8), layout="constrained", facecolor="white")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        last = {int(row["epoch"]) // curve.every + 1: row[name] for row in rows if name in row}
        axis.plot(list(last), list(last.values()), "o-", color=BLUE, linewidth=1.4, markersize=4)
        axis.set_xticks(_thin_ticks(list(last)))
        axis.set_xlabel(curve.unit, fontsize=8)
        axis.tick_params(labelsize=8)
        # A share is drawn from zero on.
        if 0 <= min(last.values()) <= max(last.values()) <= 1:
            axis.set_ylim(0, 1.08 * max(*last.values(), 1e-9))
        style_axes(axis, name.replace("_", " "))
    figure.suptitle(curve.title, fontsize=10)
    return figure


def _thin_ticks(numbers: list[int]) -> list[int]:
    """Returns at most eight of the numbers, evenly spaced."""
    return numbers[:: -(-len(numbers) // 8)]


def _list_logged_names(rows: MetricRows) -> list[str]:
    """Returns the names of all logged numbers in the order of their first row; some are not in every row."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_loss_term(name: str) -> bool:
    return name not in (*COUNTING_KEYS, *SPEED_KEYS) and not name.startswith(
        (MONITOR_PREFIX, TIME_PREFIX, "data_wait_")
    )


def _count_epochs(rows: MetricRows) -> np.ndarray:
    """Returns the (rows,) numbers of epochs that are done at each row; a part of an epoch is a fraction."""
    return np.array([row["step"] / row[STEPS_PER_EPOCH_KEY] for row in rows])


def _smooth_values(values: np.ndarray) -> np.ndarray:
    """Returns the running mean over a thirtieth of the values; fewer than MIN_SMOOTHED_VALUES are not changed."""
    if len(values) < MIN_SMOOTHED_VALUES:
        return values
    width = len(values) // 30
    return np.convolve(values, np.ones(width) / width, "valid")


def _plot_line(axis: Axes, rows: MetricRows, name: str, below: str, marker: str = "") -> None:
    """Draws one number over epochs; many values are drawn faintly, with their running mean over them."""
    epochs = _count_epochs(rows)
    here = np.array([name in row for row in rows], dtype=bool)
    x, y = epochs[here], np.array([row[name] for row in rows if name in row], dtype=float)
    many = len(y) >= MIN_SMOOTHED_VALUES
    # A line through one value is invisible.
    marker = "o" if len(y) == 1 else marker
    axis.plot(x, y, color=GRAY if many else BLUE, linewidth=0.8 if many else 1.5, marker=marker, markersize=4)
    if many:
        axis.plot(_smooth_values(x), _smooth_values(y), color=BLUE, linewidth=1.6)
    if not y.any():
        axis.set_ylim(-0.02, 1)
    axis.set_xlabel(below, fontsize=8)
    axis.tick_params(labelsize=8)
    style_axes(axis, name.replace("_", " "))
