"""The page of a search: what was searched on which data, what was best, all trials, pictures, and how to do it again."""

import json
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import split
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import write_atomically, write_json
from firstlight.pipeline.report.html_page import (
    Block,
    Cell,
    Facts,
    Fold,
    Notes,
    Page,
    Section,
    Table,
    Text,
    Tone,
    Tree,
    date,
    duration,
    public,
    render,
)
from firstlight.pipeline.report.run_report import FILE, RECIPE, SUMMARY, about_data, gallery, score_table
from firstlight.pipeline.report.score_table import Row
from firstlight.pipeline.run import data_checks
from firstlight.pipeline.search import figures as search_figures
from firstlight.pipeline.search.ledger import Ledger, Trial
from firstlight.pipeline.search.progress import front, ranked, short, shown, spread
from firstlight.pipeline.search.space import Dimension, Plan
from firstlight.pipeline.stages.stage import code_version
from firstlight.pipeline.tracking.client import run_of
from firstlight.pipeline.tracking.figures import DPI, FOLDER, INDEX, Entry

SEARCH, BEST = (
    "search.yaml",
    "best",
)  # the file that repeats a search; the folder of the recipe's run with the best setting
EDGE = 0.03  # of a range: a best value as near to an end of it is at the end
TONES: dict[str, Tone] = {"done": "good", "stopped": "unsure", "running": "unsure", "failed": "bad"}
PICTURES = {  # by the beginning of a picture's name: what it shows, and that in a sentence
    "objective": (
        "{measure}: each trial and the best so far",
        "Points, one a trial, and a line for the best so far, over trials and over time",
    ),
    "importance": (
        "What decides {measure}",
        "Bars: the share of the variance over trials that each setting explains (fANOVA)",
    ),
    "parallel": (
        "All trials through their settings",
        "A line for each trial through its value of every setting to the first objective",
    ),
    "pareto": (
        "Trials that no other betters in all objectives",
        "The first objective against each of the others; the Pareto set is marked",
    ),
    "population": (
        "The trials over epochs, and their settings",
        "A line a trial over epochs, ringed where it went on from the networks of another",
    ),
    "curve": (
        "The objective over the grid",
        "The objective against the first setting, with the standard deviation over seeds",
    ),
}


@dataclass(frozen=True)
class Searched:
    """What there is to tell. `run_id`: the search's own MLflow run; `retrained`, `rows`: the recipe with the best setting, and its table."""

    plan: Plan
    ledger: Ledger
    store: Store
    run_id: str
    uri: str
    best: Trial | None = None
    promoted: str | None = None
    retrained: Recipe | None = None
    rows: tuple[Row, ...] = ()
    error: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """The searched keys as they are told."""
        return short(list(self.plan.search.space))

    @property
    def done(self) -> list[Trial]:
        return self.ledger.of_state("done")


def write(searched: Searched) -> Path:
    """Write the pictures, the page, and the files that repeat the search, into its folder."""
    folder, plan = searched.ledger.folder, searched.plan
    draw(folder, search_figures.all_of(plan.search, searched.ledger.trials))
    repeats = plan.search.model_dump(mode="json", exclude_none=True) | {"recipe": RECIPE}
    write_atomically(folder / SEARCH, yaml_reader.dump(repeats).encode())
    write_atomically(folder / RECIPE, yaml_reader.dump(plan.whole({}).dump()).encode())
    write_atomically(folder / FILE, render(page(searched)).encode())
    return folder / FILE


def draw(folder: Path, figures: Mapping[str, Figure]) -> None:
    """An album of the search's pictures (see `firstlight.pipeline.tracking.figures`), in place of an earlier one."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    entries = []
    for name, figure in figures.items():
        figure.savefig(folder / FOLDER / f"{name}.png", dpi=DPI)
        kind, _, measure = name.partition("_")
        title, alt = PICTURES[kind]
        entries.append(Entry(name, title.format(measure=measure or "the first objective"), alt))
    write_json(folder / FOLDER / INDEX, [asdict(entry) for entry in entries])


def page(searched: Searched) -> Page:
    search, store = searched.plan.search, searched.store
    recipe, prepared = searched.plan.base(), searched.ledger.folder / f"prepare-{store.hash[:12]}"
    status, tone = _status(searched)
    sections = [
        Section("Best setting", _best(searched)),
        Section("Warnings and notes", _warnings(searched, recipe)),
        Section("Trials", _trials(searched)),
        Section("Pictures", gallery(searched.ledger.folder)),
        Section("What was searched", _what(searched, recipe)),
        Section("Data", about_data(recipe.dataset, store, split(store, recipe.dataset), prepared)),
        Section("Lineage", [_lineage(searched, prepared)]),
        Section("Run it again", _again(searched)),
    ]
    foot = f"Written by Firstlight on {date(time.time())}. Everything on this page is also in MLflow: {public(searched.uri)}"
    return Page(search.name, "Firstlight, a search", search.description, sections, status, tone, foot)


def _status(searched: Searched) -> tuple[str, Tone]:
    ended, total = len(searched.ledger.of_state("done", "stopped", "failed")), searched.plan.search.total
    if searched.error is not None:
        return f"stopped: {ended} of {total} trials ended", "bad"
    return f"finished: {ended} trials", "good"


def _best(searched: Searched) -> list[Block]:
    out: list[Block] = [Notes([searched.error], "error")] if searched.error is not None else []
    search, best = searched.plan.search, searched.best
    if best is None:
        return [*out, Text("No trial has come to its end.", "quiet")]
    scores = ", ".join(
        f"{o.measure} {spread(by_seed)}" for o, by_seed in zip(search.objectives, best.scores, strict=True)
    )
    out.append(
        Text(
            f"Trial {best.name} is the best of the {len(searched.done)} that came to their end: {scores}, on held-out images."
        )
    )
    out.append(Facts([*((key, shown(best.values[key])) for key in search.space), *_promoted(searched)]))
    if best.before:
        rows = [[f"up to {epochs}", *(shown(values[key]) for key in search.space)] for epochs, values in best.before]
        out.append(
            Table(
                "What its networks were trained with before",
                ("epochs", *searched.names.values()),
                rows,
                range(1, len(search.space) + 1),
            )
        )
    if len(search.objectives) > 1:
        told = "The first objective decides which trial is the best. No trial betters one of these in one objective without being worse in another:"
        out += [
            Text(told),
            _table(searched, "The Pareto set", ranked(front(search, searched.done), search.objectives[0])),
        ]
    out.append(
        Text("The best of many trials looks better on the images that it was chosen by than it is on others.", "quiet")
    )
    if searched.retrained is not None:
        folder = searched.ledger.folder / BEST
        told = f"The whole recipe was run with this setting and {len(searched.retrained.seeds)} seeds; its own report: {folder / FILE}"
        out += [Text(told), score_table(searched.retrained, searched.rows), *gallery(folder / SUMMARY)]
    return out


def _promoted(searched: Searched) -> Iterator[tuple[str, str]]:
    if searched.promoted:
        yield "its encoder", searched.promoted


def _warnings(searched: Searched, recipe: Recipe) -> list[Block]:
    lines = [*data_checks.wrong_with(recipe, searched.store), *_of_trials(searched), *at_an_end(searched)]
    return [Notes(lines)] if lines else [Text("None.", "quiet")]


def _of_trials(searched: Searched) -> Iterator[str]:
    trials = searched.ledger.trials
    if any(trial.code != code_version() for trial in trials):
        yield "the code has changed since some of the trials were run; their scores may not be what they would be now"
    for reason, count in Counter(trial.reason for trial in trials if trial.state == "failed").most_common():
        yield f"{count} trial{'s' if count > 1 else ''} failed: {reason}"
    if searched.done and len(searched.done[0].scores[0]) == 1:
        yield "a trial has one seed: where trials are close, another seed may order them otherwise"


def at_an_end(searched: Searched) -> Iterator[str]:
    """Settings whose best value is the lowest or the highest that was allowed: a better one may lie beyond."""
    best = searched.best
    for key, dimension in searched.plan.search.space.items() if best else ():
        assert best is not None
        value = best.values[key]
        end = _end(dimension, value)
        if end is not None:
            yield f"{key}: the best, {shown(value)}, is at the {end} end of what was searched; beyond it may be better"


def _end(dimension: Dimension, value: Any) -> str | None:
    """The end of a range, or of three numbers or more, that a value is at. Words have no ends."""
    ends = dimension.ends
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends) or (
        dimension.listed and len(ends) < 3
    ):
        return None
    low, high, at = (float(np.log(x) if dimension.loguniform else x) for x in (min(ends), max(ends), value))
    near = 0.0 if dimension.listed else EDGE * (high - low)
    return "lower" if at - low <= near else "upper" if high - at <= near else None


def _trials(searched: Searched) -> list[Block]:
    search, trials = searched.plan.search, searched.ledger.trials
    counts = Counter(trial.state for trial in ranked(trials, search.objectives[0]))
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    seconds = sum(trial.seconds for trial in trials)
    caption = f"On held-out images, best first; mean ± standard deviation over seeds where there are several. {told}; {duration(seconds)} of work"
    return [_table(searched, caption, ranked(trials, search.objectives[0]))] if trials else []


def _table(searched: Searched, caption: str, trials: Sequence[Trial]) -> Table:
    search, names = searched.plan.search, searched.names
    why = any(trial.reason for trial in trials)
    measures = [f"{o.measure} ({o.mode})" for o in search.objectives]
    heads = ["trial", "state", *names.values(), *measures, "time", *(["why"] if why else [])]
    rows: list[list[str | Cell]] = []
    for trial in trials:
        scores = [spread(by_seed) for by_seed in trial.scores] or [""] * len(measures)
        settings = [shown(trial.values[key]) for key in search.space]
        told = [duration(trial.seconds), *([trial.reason] if why else [])]
        rows.append([trial.name, Cell(trial.state, TONES[trial.state]), *settings, *scores, *told])
    return Table(caption, heads, rows, range(2, len(heads) - why))


def _what(searched: Searched, recipe: Recipe) -> list[Block]:
    search, plan = searched.plan.search, searched.plan
    rows = [[key, *_values(dimension)] for key, dimension in search.space.items()]
    scheduler = ", ".join(
        f"{key}: {shown(value)}" for key, value in search.scheduler.model_dump(mode="json", exclude={"name"}).items()
    )
    facts = [
        ("recipe", f"{recipe.name} ({plan.file})"),
        ("stages", f"{', '.join(plan.stages(recipe))}, in each trial"),
        *(
            ("objective", f"{o.measure}, {'larger' if o.mode == 'max' else 'smaller'} is better")
            for o in search.objectives
        ),
        ("algorithm", f"{search.algorithm}, seed {search.seed}"),
        ("scheduler", search.scheduler.name + (f" ({scheduler})" if scheduler else "")),
        ("trials", f"{search.total}" + (f", {search.concurrency} at a time at most" if search.concurrency else "")),
        ("seeds", f"{', '.join(map(str, recipe.seeds))}, in each trial"),
        *((f"for {stage}", f"the encoder {reference}") for stage, reference in searched.ledger.references.items()),
        ("code", code_version()),
        ("MLflow", public(searched.uri)),
        ("files", str(searched.ledger.folder)),
    ]
    budget = [
        Fold(
            "The budget of a trial, laid over the recipe",
            [Facts([(key, shown(value)) for key, value in search.overrides.items()])],
        )
    ]
    return [
        Table("The space", ("setting", "drawn", "values"), rows),
        Facts(facts),
        *(budget if search.overrides else []),
    ]


def _values(dimension: Dimension) -> tuple[str, str]:
    (kind,) = dimension.model_dump(exclude_none=True)
    if dimension.listed:
        return kind, ", ".join(shown(value) for value in dimension.listed)
    low, high, *step = dimension.bounds
    return kind, f"{shown(low)} to {shown(high)}" + (f" in steps of {shown(step[0])}" if step else "")


def _lineage(searched: Searched, prepared: Path) -> Tree:
    """From the search to the store, its trials, and what became of the best."""
    ledger, best = searched.ledger, searched.best
    trials = [Tree(f"trial {trial.name}", _run(ledger.place(trial)), _made(searched, trial)) for trial in ledger.trials]
    retrained = [
        Tree(file.parent.name, _run(file.parent)) for file in sorted((ledger.folder / BEST).glob("*-seed*/mlflow.json"))
    ]
    again = (
        [Tree(f"the whole recipe, with the setting of trial {best.name}", "", retrained)] if best and retrained else []
    )
    store = Tree(
        f"store {searched.store.path.name}", f"sha256 {searched.store.hash}, {_run(prepared)}", [*trials, *again]
    )
    return Tree(searched.plan.search.name, f"run {searched.run_id}", [store])


def _made(searched: Searched, trial: Trial) -> list[Tree]:
    """The encoder that a trial made, of the best with the name that it was given."""
    if trial.encoder is None:
        return []
    name = searched.promoted if searched.promoted and trial is searched.best and searched.retrained is None else ""
    return [Tree(f"encoder{f', {name}' if name else ''}", f"runs:/{trial.encoder}/encoder")]


def _run(folder: Path) -> str:
    run_id = run_of(folder)
    return f"run {run_id}" if run_id else "no run"


def overrides(values: Mapping[str, Any]) -> list[str]:
    """A setting as words of a command line."""
    return [shlex.quote(f"{key}={json.dumps(value)}") for key, value in values.items()]


def _again(searched: Searched) -> list[Block]:
    folder, search, best = searched.ledger.folder, searched.plan.search, searched.best
    here = f"cd {shlex.quote(str(Path.cwd()))}\n"
    out: list[Block] = [
        Text(
            "The same command goes on where a search was stopped, and adds to it with a larger trials=. So does this, from what is beside this page:"
        ),
        Text(f"{here}firstlight search {shlex.quote(str(folder / SEARCH))}", "code"),
        Text("From nothing, under another name:"),
        Text(f"{here}firstlight search {shlex.quote(str(folder / SEARCH))} name={search.name}-again", "code"),
    ]
    if best is not None and not best.parts:  # the best of a population has no one setting
        words = " \\\n    ".join([f"name={search.name}-best", *overrides(best.values)])
        told = "The whole recipe with the best setting, without the budget of a trial, with all its seeds and the test split:"
        out += [Text(told), Text(f"{here}firstlight run {shlex.quote(str(folder / RECIPE))} {words}", "code")]
    out += [
        Text("Its runs, pictures and models, in MLflow:"),
        Text(f"mlflow ui --backend-store-uri {public(searched.uri)}", "code"),
    ]
    return [
        *out,
        Fold(
            "The search, resolved",
            [Text(public(yaml_reader.dump(search.model_dump(mode="json", exclude_none=True))), "code")],
        ),
    ]
