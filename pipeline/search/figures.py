"""Figures of a search, drawn with matplotlib. `firstlight.pipeline.report.figures` draws those of the stages."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from firstlight.pipeline.report.figures import BLUE, GRAY, RED
from firstlight.pipeline.search.ledger import Segment, Trial
from firstlight.pipeline.search.objectives import Objective, parse_measure
from firstlight.pipeline.search.progress import format_value, pareto_front, shorten_keys
from firstlight.pipeline.search.sampler import build_study
from firstlight.pipeline.search.space import Search

# Colours of the lines of one panel.
CURVE_COLOURS = (BLUE, "#d9822b", "#2e8b57", "#8e44ad", RED, "#5d6d7e", "#16a2b8", "#b7950b")
MIN_TRIALS_FOR_IMPORTANCE = 4
MAX_TICKS = 6


def draw_figures(search: Search, trials: Sequence[Trial]) -> dict[str, Figure]:
    """Returns, by name, all figures for which there are enough trials."""
    done = [trial for trial in trials if trial.state == "done"]
    figures: dict[str, Figure] = {}
    for k, objective in enumerate(search.objectives if done else ()):
        ending = f"_{objective.measure}" if k else ""
        figures[f"objective{ending}"] = draw_history(trials, objective, k)
        shares = compute_importances(search, trials, k)
        if shares:
            figures[f"importance{ending}"] = draw_importances(shares, objective)
    if len(done) > 1:
        figures["parallel"] = draw_parallel(search, done)
        if len(search.objectives) > 1:
            figures["pareto"] = draw_pareto(search, done)
        if search.algorithm == "grid" and len(search.space) <= 2:
            figures["curve"] = draw_curve(search, done)
    if any(trial.parts for trial in trials):
        figures["population"] = draw_population(search, trials)
    return figures


def _make_axes(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def _set_titles(axis: Axes, title: str, x: str = "", y: str = "") -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def draw_history(trials: Sequence[Trial], objective: Objective, k: int = 0) -> Figure:
    """Draws objective `k` of each trial and the best so far, in the order in which trials ended: by number, by time."""
    ended = sorted((trial for trial in trials if trial.state != "running"), key=lambda trial: trial.ended)
    done = [(order, trial) for order, trial in enumerate(ended, 1) if trial.state == "done"]
    begun = min(trial.ended - trial.seconds for trial in ended)
    figure, axes = _make_axes(9.2, 3.4, 2)
    values = [trial.means[k] for _, trial in done]
    best = np.maximum.accumulate(objective.sign * np.asarray(values)) * objective.sign
    seconds, unit = _choose_time_unit(max(trial.ended for trial in ended) - begun)
    numbers, times = [order for order, _ in done], [(trial.ended - begun) / seconds for _, trial in done]
    for axis, positions, label in ((axes[0], numbers, "trials that have ended"), (axes[1], times, unit)):
        axis.plot(positions, values, "o", color=GRAY, markersize=5, label="a trial")
        axis.step(positions, best, where="post", color=BLUE, linewidth=1.6, label="the best so far")
        _set_titles(axis, "", label, objective.measure)
    for state, colour, marker in (("stopped", CURVE_COLOURS[1], "|"), ("failed", RED, "x")):
        positions = [order for order, trial in enumerate(ended, 1) if trial.state == state]
        if positions:
            style = {"transform": axes[0].get_xaxis_transform(), "markersize": 7, "label": state}
            axes[0].plot(positions, [0.04] * len(positions), marker, color=colour, **style)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False, fontsize=8, loc="best")
    seeds = len(done[0][1].scores[k])
    mean = f", mean of {seeds} seeds" if seeds > 1 else ""
    axes[0].set_title(f"{objective.measure} on held-out images ({objective.mode}){mean}", loc="left", fontsize=10)
    return figure


def _choose_time_unit(seconds: float) -> tuple[float, str]:
    """Returns the seconds of a unit that suits a duration, and the name of the unit."""
    return (1.0, "seconds") if seconds < 300 else (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def compute_importances(search: Search, trials: Sequence[Trial], k: int = 0) -> dict[str, float]:
    """Returns, by dotted key, the share of the variance of objective `k` that a setting explains.

    The shares are computed by fANOVA (Hutter et al. 2014). Returns {} for less than four trials, or if they
    differ in one setting only.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    done = [trial for trial in trials if trial.state == "done"]
    varied = [key for key in search.space if len({json.dumps(trial.values[key]) for trial in done}) > 1]
    if len(done) < MIN_TRIALS_FOR_IMPORTANCE or len(varied) < 2 or len({trial.means[k] for trial in done}) < 2:
        return {}
    shares = get_param_importances(
        build_study(search, done),
        evaluator=FanovaImportanceEvaluator(seed=search.seed),
        params=varied,
        target=lambda trial: trial.values[k],
    )
    return {key: float(share) for key, share in shares.items()}


def draw_importances(shares: dict[str, float], objective: Objective) -> Figure:
    """Draws a bar for each setting: the share of the variance of an objective that it explains."""
    figure, (axis,) = _make_axes(6.4, 0.42 * len(shares) + 1.1)
    names, rows = shorten_keys(list(shares)), sorted(shares.items(), key=lambda pair: pair[1])
    axis.barh([names[key] for key, _ in rows], [share for _, share in rows], 0.6, color=BLUE)
    for row, (_, share) in enumerate(rows):
        axis.text(share + 0.01, row, f"{share:.2f}", va="center", fontsize=8)
    axis.set_xlim(0, 1.1)
    axis.grid(axis="y", visible=False)
    _set_titles(axis, f"what decides {objective.measure} (fANOVA)", "share of the variance")
    return figure


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _axis_positions(values: Sequence[Any], log: bool) -> tuple[np.ndarray, dict[float, str]]:
    """Returns positions of values on an axis, 0..1, and labels for some positions.

    Numbers are placed by size, other values in alphabetical order.
    """
    if not _are_numbers(values):
        kinds = sorted({format_value(value) for value in values})
        positions = np.asarray([(kinds.index(format_value(value)) + 0.5) / len(kinds) for value in values])
        return positions, {(k + 0.5) / len(kinds): kind for k, kind in enumerate(kinds)}
    numbers = np.log10(np.asarray(values, float)) if log else np.asarray(values, float)
    low, high = numbers.min(), numbers.max()
    positions = (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)
    distinct = sorted(set(values))
    if len(distinct) <= MAX_TICKS:
        return positions, {float(positions[list(values).index(value)]): format_value(value) for value in distinct}
    ticks = np.linspace(low, high, 5)
    return positions, {float((tick - low) / (high - low)): f"{10**tick if log else tick:.3g}" for tick in ticks}


def draw_parallel(search: Search, done: Sequence[Trial]) -> Figure:
    """Draws a line for each trial through its settings to its first objective, which is also its colour."""
    objective, names = search.objectives[0], shorten_keys(list(search.space))
    columns = [
        (names[key], [trial.values[key] for trial in done], search.space[key].loguniform is not None)
        for key in search.space
    ]
    columns.append((objective.measure, [trial.means[0] for trial in done], False))
    figure = Figure(figsize=(max(5.0, 1.7 * len(columns)), 4.0), layout="constrained", facecolor="white")
    axis = figure.subplots()
    placed = [_axis_positions(values, log) for _, values, log in columns]
    lines = np.stack([positions for positions, _ in placed], axis=1)
    merit = objective.sign * np.asarray([trial.means[0] for trial in done])
    colour = colormaps["viridis_r"]
    low = merit.min() if merit.max() > merit.min() else merit.min() - 1
    scale = Normalize(low, merit.max())
    # The best trial is drawn last, on top.
    for k in np.argsort(merit):
        best = merit[k] == merit.max()
        width, alpha = (2.6, 1.0) if best else (1.2, 0.8)
        axis.plot(range(len(columns)), lines[k], color=colour(scale(merit[k])), linewidth=width, alpha=alpha)
    box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8}
    for column, (_, ticks) in enumerate(placed):
        axis.axvline(column, color="black", linewidth=0.8)
        for position, label in ticks.items():
            axis.text(column + 0.03, position, label, fontsize=7, va="center", bbox=box)
    axis.set_xticks(range(len(columns)), [f"{name}\n(log)" if log else name for name, _, log in columns], fontsize=8)
    axis.set_yticks([])
    axis.set_xlim(-0.1, len(columns) - 0.55)
    axis.set_ylim(-0.04, 1.04)
    axis.spines[:].set_visible(False)
    title = f"trials through their settings; dark is better, the thick line is the best {objective.measure}"
    axis.set_title(title, loc="left", fontsize=10)
    return figure


def draw_population(search: Search, trials: Sequence[Trial]) -> Figure:
    """Draws what the trials of a population reached over epochs or steps, and their numeric settings over them.

    A ring marks where a trial copied the networks of another one. The best trial is on top.
    """
    assert search.scheduler_objective is not None
    measure, mode = search.scheduler_objective
    names = shorten_keys(list(search.space))
    numeric = [key for key, dimension in search.space.items() if not dimension.listed_values]
    figure, axes = _make_axes(5.2 * (1 + len(numeric)), 3.6, 1 + len(numeric))
    last = [trial.seen[-1][1] if trial.seen else np.nan for trial in trials]
    sign = 1 if mode == "max" else -1
    order = [trials[k] for k in np.argsort(sign * np.nan_to_num(last, nan=-sign * np.inf))]
    for trial in order:
        best = trial is order[-1]
        look = (BLUE, 2.2, 1.0) if best else (GRAY, 1.0, 0.7)
        style: dict[str, Any] = dict(zip(("color", "linewidth", "alpha"), look, strict=True))
        if trial.seen:
            axes[0].plot(*zip(*trial.seen, strict=True), **style)
        segments = [*trial.parts, _next_segment(trial)]
        copied = [before.end for before, after in itertools.pairwise(segments) if after.origin is not None]
        values = [dict(trial.seen).get(float(end), np.nan) for end in copied]
        axes[0].plot(copied, values, "o", color=RED, fillstyle="none", markersize=6)
        edges = [0, *(segment.end for segment in segments)]
        for axis, key in zip(axes[1:], numeric, strict=True):
            settings = [segment.values[key] for segment in segments]
            axis.step(edges, [settings[0], *settings], where="pre", **style)
            if search.space[key].loguniform:
                axis.set_yscale("log")
    _set_titles(axes[0], f"{measure}; ring: copied from another trial", trials[0].unit, measure)
    for axis, key in zip(axes[1:], numeric, strict=True):
        _set_titles(axis, names[key], trials[0].unit)
    return figure


def _next_segment(trial: Trial) -> Segment:
    """Returns the segment after those that have ended: the last one, the running one, or the next one."""
    end = trial.until or (round(trial.seen[-1][0]) if trial.seen else 0)
    return Segment(end, trial.values, np.nan, trial.origin)


def draw_pareto(search: Search, done: Sequence[Trial]) -> Figure:
    """Draws the first objective against each of the others, with the Pareto set marked."""
    figure, axes = _make_axes(4.6 * (len(search.objectives) - 1) + 0.4, 3.8, len(search.objectives) - 1)
    front = pareto_front(search, done)
    labels = [f"{objective.measure} ({objective.mode})" for objective in search.objectives]
    for k, axis in enumerate(axes, 1):
        for trials, colour, size, label in ((done, GRAY, 5, "a trial"), (front, BLUE, 7, "Pareto set")):
            x, y = [trial.means[k] for trial in trials], [trial.means[0] for trial in trials]
            axis.plot(x, y, "o", color=colour, markersize=size, label=label)
        for trial in front:
            point = (trial.means[k], trial.means[0])
            axis.annotate(trial.name, point, xytext=(5, 4), textcoords="offset points", fontsize=7)
        _set_titles(axis, "", labels[k], labels[0])
        axis.margins(0.12)
    axes[0].legend(frameon=False, fontsize=8, loc="best")
    axes[0].set_title("trials that no other one beats in all objectives", loc="left", fontsize=10)
    return figure


def draw_curve(search: Search, done: Sequence[Trial]) -> Figure:
    """Draws the objective of a grid of one or two keys against the first key: mean and standard deviation over seeds.

    There is a line for each value of the second key, or for each of several objectives.
    """
    (x, *_), names = search.space, shorten_keys(list(search.space))
    figure, (axis,) = _make_axes(5.6, 3.8)
    values = list(search.space[x].listed_values)
    numeric = _are_numbers(values)
    for k, (label, scores) in enumerate(_curve_lines(search, done)):
        points = sorted(((value if numeric else values.index(value)), by_seed) for value, by_seed in scores)
        positions, means = [point for point, _ in points], [float(np.mean(by_seed)) for _, by_seed in points]
        stds = [float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0 for _, by_seed in points]
        colour = CURVE_COLOURS[k % len(CURVE_COLOURS)]
        style = {"fmt": "o-", "color": colour, "markersize": 4, "linewidth": 1.6, "capsize": 3}
        axis.errorbar(positions, means, yerr=stds if any(stds) else None, label=label, **style)
    if numeric and min(values) > 0 and max(values) >= 10 * min(values):
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(values if numeric else range(len(values)), [format_value(value) for value in values], fontsize=8)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=8, loc="best")
    seeds, measure = len(done[0].scores[0]), search.objectives[0].measure
    stage = parse_measure(measure).stage
    deviation = f": mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    y = stage if _has_several_objectives(search) else measure
    _set_titles(axis, f"{stage} on held-out images{deviation}", names[x], y)
    return figure


def _has_several_objectives(search: Search) -> bool:
    return len(search.space) == 1 and len(search.objectives) > 1


def _curve_lines(search: Search, done: Sequence[Trial]) -> list[tuple[str | None, list[tuple[Any, list[float]]]]]:
    """Returns, for each line, its label and, for each trial, the value of the first key and the scores by seed."""
    x, *second = search.space
    if not second:
        labels = [objective.measure for objective in search.objectives] if _has_several_objectives(search) else [None]
        return [(label, [(trial.values[x], trial.scores[k]) for trial in done]) for k, label in enumerate(labels)]
    key, name = second[0], shorten_keys(list(search.space))[second[0]]
    return [
        (f"{name} {format_value(value)}", [(t.values[x], t.scores[0]) for t in done if t.values[key] == value])
        for value in search.space[key].listed_values
    ]
