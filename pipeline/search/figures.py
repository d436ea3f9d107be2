"""Pictures of a search, drawn with matplotlib as those of the stages are (see `firstlight.pipeline.report.figures`)."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from firstlight.pipeline.report.figures import BLUE, GRAY, RED
from firstlight.pipeline.search.ledger import Part, Trial
from firstlight.pipeline.search.objectives import Objective
from firstlight.pipeline.search.progress import front, short, shown
from firstlight.pipeline.search.sampler import study
from firstlight.pipeline.search.space import Search

COLOURS = ("#2458a6", "#d9822b", "#2e8b57", "#8e44ad", "#b3372e", "#5d6d7e", "#16a2b8", "#b7950b")  # lines of one panel
ENOUGH = 4  # trials that importances are told from


def all_of(search: Search, trials: Sequence[Trial]) -> dict[str, Figure]:
    """By name, those that these trials are enough for."""
    done = [trial for trial in trials if trial.state == "done"]
    found: dict[str, Figure] = {}
    for k, objective in enumerate(search.objectives if done else ()):
        ending = f"_{objective.measure}" if k else ""
        found[f"objective{ending}"] = history(trials, objective, k)
        shares = importances(search, trials, k)
        if shares:
            found[f"importance{ending}"] = importance(shares, objective)
    if len(done) > 1:
        found["parallel"] = parallel(search, done)
        if len(search.objectives) > 1:
            found["pareto"] = pareto(search, done)
        if search.algorithm == "grid" and len(search.space) <= 2:
            found["curve"] = curve(search, done)
    if any(trial.parts for trial in trials):
        found["population"] = population(search, trials)
    return found


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def _titled(axis: Axes, title: str, x: str = "", y: str = "") -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def history(trials: Sequence[Trial], objective: Objective, k: int = 0) -> Figure:
    """The objective of each trial, and the best so far, in the order in which they ended; over trials, and over time."""
    ended = sorted((trial for trial in trials if trial.state != "running"), key=lambda trial: trial.ended)
    done = [(place + 1, trial) for place, trial in enumerate(ended) if trial.state == "done"]
    begun = min(trial.ended - trial.seconds for trial in ended)
    figure, axes = _axes(9.2, 3.4, 2)
    values = [trial.means[k] for _, trial in done]
    best = np.maximum.accumulate(objective.sign * np.asarray(values)) * objective.sign
    per, unit = _unit(max(trial.ended for trial in ended) - begun)
    for axis, places, label in (
        (axes[0], [place for place, _ in done], "trials that have ended"),
        (axes[1], [(trial.ended - begun) / per for _, trial in done], unit),
    ):
        axis.plot(places, values, "o", color=GRAY, markersize=5, label="a trial")
        axis.step(places, best, where="post", color=BLUE, linewidth=1.6, label="the best so far")
        _titled(axis, "", label, objective.measure)
    for state, colour, marker in (("stopped", "#d9822b", "|"), ("failed", RED, "x")):
        places = [place + 1 for place, trial in enumerate(ended) if trial.state == state]
        if places:
            at_the_foot = {"transform": axes[0].get_xaxis_transform(), "markersize": 7, "label": state}
            axes[0].plot(places, [0.04] * len(places), marker, color=colour, **at_the_foot)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False, fontsize=8, loc="best")
    seeds = len(done[0][1].scores[k])
    axes[0].set_title(
        f"{objective.measure} on held-out images ({objective.mode}){f', mean of {seeds} seeds' if seeds > 1 else ''}",
        loc="left",
        fontsize=10,
    )
    return figure


def _unit(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds < 300 else (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def importances(search: Search, trials: Sequence[Trial], k: int = 0) -> dict[str, float]:
    """By dotted key, the share of the objective's variance that a setting explains, by fANOVA (Hutter et al. 2014); {} where trials are too few, or
    differ in one setting only."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    done = [trial for trial in trials if trial.state == "done"]
    varied = [key for key in search.space if len({json.dumps(trial.values[key]) for trial in done}) > 1]
    if len(done) < ENOUGH or len(varied) < 2 or len({trial.means[k] for trial in done}) < 2:
        return {}
    found = get_param_importances(
        study(search, done),
        evaluator=FanovaImportanceEvaluator(seed=search.seed),
        params=varied,
        target=lambda trial: trial.values[k],
    )
    return {key: float(share) for key, share in found.items()}


def importance(shares: dict[str, float], objective: Objective) -> Figure:
    figure, (axis,) = _axes(6.4, 0.42 * len(shares) + 1.1)
    names, rows = short(list(shares)), sorted(shares.items(), key=lambda pair: pair[1])
    axis.barh([names[key] for key, _ in rows], [share for _, share in rows], 0.6, color=BLUE)
    for place, (_, share) in enumerate(rows):
        axis.text(share + 0.01, place, f"{share:.2f}", va="center", fontsize=8)
    axis.set_xlim(0, 1.1)
    axis.grid(axis="y", visible=False)
    _titled(axis, f"what decides {objective.measure} (fANOVA)", "share of the variance")
    return figure


def _places(values: Sequence[Any], log: bool) -> tuple[np.ndarray, dict[float, str]]:
    """Values in 0..1, and the labels of some of those places: numbers by size, others in the order of the alphabet."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = np.log10(np.asarray(values, float)) if log else np.asarray(values, float)
        low, high = numbers.min(), numbers.max()
        at = (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)
        distinct = sorted(set(values))
        if len(distinct) <= 6:
            return at, {float(at[list(values).index(value)]): shown(value) for value in distinct}
        ticks = np.linspace(low, high, 5)
        return at, {float((t - low) / (high - low)): f"{10**t if log else t:.3g}" for t in ticks}
    kinds = sorted({shown(value) for value in values})
    at = np.asarray([(kinds.index(shown(value)) + 0.5) / len(kinds) for value in values])
    return at, {(k + 0.5) / len(kinds): kind for k, kind in enumerate(kinds)}


def parallel(search: Search, done: Sequence[Trial]) -> Figure:
    """A line a trial through its settings to its first objective, whose colour it has."""
    objective, names = search.objectives[0], short(list(search.space))
    columns = [
        (names[key], [trial.values[key] for trial in done], search.space[key].loguniform is not None)
        for key in search.space
    ]
    columns.append((objective.measure, [trial.means[0] for trial in done], False))
    figure = Figure(figsize=(max(5.0, 1.7 * len(columns)), 4.0), layout="constrained", facecolor="white")
    axis = figure.subplots()
    placed = [_places(values, log) for _, values, log in columns]
    lines = np.stack([at for at, _ in placed], axis=1)
    merit = objective.sign * np.asarray([trial.means[0] for trial in done])
    colour = matplotlib.colormaps["viridis_r"]
    scale = (
        Normalize(merit.min(), merit.max()) if merit.max() > merit.min() else Normalize(merit.min() - 1, merit.max())
    )
    for place in np.argsort(merit):  # the best on top
        best = merit[place] == merit.max()
        axis.plot(
            range(len(columns)),
            lines[place],
            color=colour(scale(merit[place])),
            linewidth=2.6 if best else 1.2,
            alpha=1.0 if best else 0.8,
        )
    for k, (_, ticks) in enumerate(placed):
        axis.axvline(k, color="black", linewidth=0.8)
        for at, label in ticks.items():
            axis.text(
                k + 0.03,
                at,
                label,
                fontsize=7,
                va="center",
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            )
    axis.set_xticks(range(len(columns)), [f"{name}\n(log)" if log else name for name, _, log in columns], fontsize=8)
    axis.set_yticks([])
    axis.set_xlim(-0.1, len(columns) - 0.55)
    axis.set_ylim(-0.04, 1.04)
    axis.spines[:].set_visible(False)
    axis.set_title(
        f"trials through their settings; dark is better, the thick line is the best {objective.measure}",
        loc="left",
        fontsize=10,
    )
    return figure


def population(search: Search, trials: Sequence[Trial]) -> Figure:
    """What the trials of a population have come to over epochs, and their settings where those are numbers; a ring is where a trial went on from the
    networks of another. The best is on top."""
    assert search.deciding is not None
    names, numeric = short(list(search.space)), [key for key, dimension in search.space.items() if not dimension.listed]
    figure, axes = _axes(5.2 * (1 + len(numeric)), 3.6, 1 + len(numeric))
    at_the_end = [trial.seen[-1][1] if trial.seen else np.nan for trial in trials]
    sign = 1 if search.deciding[1] == "max" else -1
    order = [trials[k] for k in np.argsort(sign * np.nan_to_num(at_the_end, nan=-sign * np.inf))]
    for trial in order:
        best = trial is order[-1]
        style: dict[str, Any] = {
            "color": BLUE if best else GRAY,
            "linewidth": 2.2 if best else 1.0,
            "alpha": 1.0 if best else 0.7,
        }
        axes[0].plot(*zip(*trial.seen, strict=True), **style) if trial.seen else None
        taken = [
            before.epochs
            for before, part in itertools.pairwise([*trial.parts, _next(trial)])
            if part.origin is not None
        ]
        axes[0].plot(
            taken,
            [dict(trial.seen).get(float(epochs), np.nan) for epochs in taken],
            "o",
            color=RED,
            fillstyle="none",
            markersize=6,
        )
        for axis, key in zip(axes[1:], numeric, strict=True):
            parts = [*trial.parts, _next(trial)]
            edges = [0, *(part.epochs for part in parts)]
            axis.step(edges, [parts[0].values[key], *(part.values[key] for part in parts)], where="pre", **style)
            if search.space[key].loguniform:
                axis.set_yscale("log")
    _titled(axes[0], f"{search.deciding[0]}; ring: taken over from another trial", "epochs", search.deciding[0])
    for axis, key in zip(axes[1:], numeric, strict=True):
        _titled(axis, names[key], "epochs")
    return figure


def _next(trial: Trial) -> Part:
    """The part that came, or is to come, after those that have ended."""
    end = trial.until or round(trial.seen[-1][0]) if trial.seen else trial.until or 0
    return Part(end, trial.values, np.nan, trial.origin)


def pareto(search: Search, done: Sequence[Trial]) -> Figure:
    """The first objective against each of the others; those that nothing betters in all are marked."""
    figure, axes = _axes(4.6 * (len(search.objectives) - 1) + 0.4, 3.8, len(search.objectives) - 1)
    best = front(search, done)
    for k, axis in enumerate(axes, 1):
        axis.plot(
            [t.means[k] for t in done], [t.means[0] for t in done], "o", color=GRAY, markersize=5, label="a trial"
        )
        axis.plot(
            [t.means[k] for t in best], [t.means[0] for t in best], "o", color=BLUE, markersize=7, label="Pareto set"
        )
        for trial in best:
            at = (trial.means[k], trial.means[0])
            axis.annotate(trial.name, at, xytext=(5, 4), textcoords="offset points", fontsize=7)
        _titled(
            axis,
            "",
            f"{search.objectives[k].measure} ({search.objectives[k].mode})",
            f"{search.objectives[0].measure} ({search.objectives[0].mode})",
        )
        axis.margins(0.12)
    axes[0].legend(frameon=False, fontsize=8, loc="best")
    axes[0].set_title("trials that no other betters in all objectives", loc="left", fontsize=10)
    return figure


def curve(search: Search, done: Sequence[Trial]) -> Figure:
    """Of a grid over one key or two: the objective against the first key, mean and standard deviation over seeds; a line for each value of the
    second key, or for each of several objectives."""
    (x, *_), names = search.space, short(list(search.space))
    figure, (axis,) = _axes(5.6, 3.8)
    values = list(search.space[x].listed)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    for k, (label, scores) in enumerate(_lines(search, done)):
        points = sorted(((value if numeric else values.index(value)), by_seed) for value, by_seed in scores)
        at, means = [point for point, _ in points], [float(np.mean(by_seed)) for _, by_seed in points]
        spread = [float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0 for _, by_seed in points]
        style = {"fmt": "o-", "color": COLOURS[k % len(COLOURS)], "markersize": 4, "linewidth": 1.6, "capsize": 3}
        axis.errorbar(at, means, yerr=spread if any(spread) else None, label=label, **style)
    if numeric and min(values) > 0 and max(values) >= 10 * min(values):
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(values if numeric else range(len(values)), [shown(value) for value in values], fontsize=8)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=8, loc="best")
    seeds, measure = len(done[0].scores[0]), search.objectives[0].measure
    told = f"{measure.partition('.')[0]} on held-out images" + (
        f": mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    )
    _titled(axis, told, names[x], measure.partition(".")[0] if _several(search) else measure)
    return figure


def _several(search: Search) -> bool:
    return len(search.space) == 1 and len(search.objectives) > 1


def _lines(search: Search, done: Sequence[Trial]) -> list[tuple[str | None, list[tuple[Any, list[float]]]]]:
    """A label and, for each trial, the first key's value and its scores by seed."""
    x, *second = search.space
    if not second:
        labels = [objective.measure for objective in search.objectives] if _several(search) else [None]
        return [(label, [(trial.values[x], trial.scores[k]) for trial in done]) for k, label in enumerate(labels)]
    name = short(list(search.space))[second[0]]
    found: list[tuple[str | None, list[tuple[Any, list[float]]]]] = []
    for value in search.space[second[0]].listed:
        found.append(
            (f"{name} {shown(value)}", [(t.values[x], t.scores[0]) for t in done if t.values[second[0]] == value])
        )
    return found
