"""The report of a search: a page with the best trial, all trials, figures, the lineage, and how to repeat it."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.report.html_page import (
    Block,
    Page,
    PageSection,
    Text,
    Tone,
    Tree,
    render_page,
)
from firstlight.pipeline.report.page_parts import (
    RECIPE_FILE,
    REPORT_FILE,
    data_blocks,
    describe_run,
    figure_blocks,
    footer_text,
    mlflow_blocks,
    resolved_block,
)
from firstlight.pipeline.report.publish.figure_log import save_figure
from firstlight.pipeline.search.figures import draw_figures
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.report_blocks import (
    BEST_FOLDER,
    SearchReport,
    best_blocks,
    search_blocks,
    trials_blocks,
    warnings_blocks,
)
from firstlight.pipeline.tracking.figures import FIGURES_FOLDER, FigureEntry, write_figure_index
from firstlight.pipeline.tracking.run_file import RUN_FILE

# The file that repeats a search.
SEARCH_FILE = "search.yaml"
# Title and alternative text of a figure, by the beginning of its name.
FIGURE_CAPTIONS = {
    "objective": (
        "{measure}: each trial and the best so far",
        "A point for each trial, and a line for the best so far, over trials and over time",
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
        "Trials that no other one beats in all objectives",
        "The first objective against each of the others; the Pareto set is marked",
    ),
    "population": (
        "The trials while they train, and their settings",
        "A line for each trial while it trains, with a ring where it copied the networks of another one",
    ),
    "curve": (
        "The objective over the grid",
        "The objective against the first setting, with the standard deviation over seeds",
    ),
}


def write_search_report(report: SearchReport) -> Path:
    """Writes the figures, the page, and the files that repeat the search, into its folder. Returns the page."""
    folder, plan = report.state.folder, report.plan
    save_figures(folder, draw_figures(plan.search, report.state.trials))
    repeats = plan.search.model_dump(mode="json", exclude_none=True) | {"recipe": RECIPE_FILE}
    write_atomically(folder / SEARCH_FILE, yaml_reader.dump_yaml(repeats).encode())
    write_atomically(folder / RECIPE_FILE, yaml_reader.dump_yaml(plan.full_recipe({}).dump()).encode())
    write_atomically(folder / REPORT_FILE, render_page(build_search_page(report)).encode())
    return folder / REPORT_FILE


def save_figures(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Writes figures and their index, as `firstlight.pipeline.tracking.figures` reads them. Replaces earlier ones."""
    (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    entries = []
    for name, figure in figures.items():
        save_figure(figure, folder / FIGURES_FOLDER / f"{name}.png")
        kind, _, measure = name.partition("_")
        title, alt = FIGURE_CAPTIONS[kind]
        entries.append(FigureEntry(name, title.format(measure=measure or "the first objective"), alt))
    write_figure_index(folder / FIGURES_FOLDER, entries)


def build_search_page(report: SearchReport) -> Page:
    """Returns the page with all sections of the report."""
    search, store = report.plan.search, report.store
    recipe, prepared = report.plan.budget_recipe(), report.state.folder / f"prepare-{store.hash[:12]}"
    status, tone = _search_status(report)
    sections = [
        PageSection("Best setting", best_blocks(report)),
        PageSection("Warnings and notes", warnings_blocks(report, recipe)),
        PageSection("Trials", trials_blocks(report)),
        PageSection("Pictures", figure_blocks(report.state.folder)),
        PageSection("What was searched", search_blocks(report, recipe)),
        PageSection(
            "Data",
            data_blocks(recipe.dataset, store, draw_splits(store, recipe.dataset, recipe.measured_splits), prepared),
        ),
        PageSection("Lineage", [_search_lineage(report, prepared)]),
        PageSection("Run it again", _repeat_search_blocks(report)),
    ]
    footer = footer_text(report.uri)
    return Page(search.name, "Firstlight, a search", search.description, sections, status, tone, footer)


def _search_status(report: SearchReport) -> tuple[str, Tone]:
    ended, total = len(report.state.trials_in("done", "stopped", "failed")), report.plan.search.num_trials
    if report.error is not None:
        return f"stopped: {ended} of {total} trials ended", "bad"
    return f"finished: {ended} trials", "good"


def _search_lineage(report: SearchReport, prepared: Path) -> Tree:
    """Returns the tree of the store, its trials, and what was made of the best trial, with their MLflow runs."""
    state, best, store = report.state, report.best, report.store
    below = [
        Tree(f"trial {trial.name}", describe_run(state.trial_folder(trial), "no run"), _encoder_branch(report, trial))
        for trial in state.trials
    ]
    folders = [file.parent for file in sorted((state.folder / BEST_FOLDER).glob(f"*-seed*/{RUN_FILE}"))]
    if best and folders:
        runs = [Tree(folder.name, describe_run(folder, "no run")) for folder in folders]
        below.append(Tree(f"the full recipe, with the setting of trial {best.name}", "", runs))
    remark = f"sha256 {store.hash}, {describe_run(prepared, 'no run')}"
    return Tree(report.plan.search.name, f"run {report.run_id}", [Tree(f"store {store.path.name}", remark, below)])


def _encoder_branch(report: SearchReport, trial: Trial) -> list[Tree]:
    """Returns the encoder of a trial, with its registered name if it is the one that was promoted."""
    if trial.encoder is None:
        return []
    is_promoted = report.promoted and trial is report.best and report.retrained is None
    name = f", {report.promoted}" if is_promoted else ""
    return [Tree(f"encoder{name}", f"runs:/{trial.encoder}/encoder")]


def format_overrides(values: Mapping[str, Any]) -> list[str]:
    """Returns a setting as words of a command line, `key=value`."""
    return [shlex.quote(f"{key}={json.dumps(value)}") for key, value in values.items()]


def _repeat_search_blocks(report: SearchReport) -> list[Block]:
    folder, search, best = report.state.folder, report.plan.search, report.best
    cd = f"cd {shlex.quote(str(Path.cwd()))}\n"
    file = shlex.quote(str(folder / SEARCH_FILE))
    text = (
        "The same command resumes a search that was stopped, and adds trials with a larger trials=. So does this one, "
        "from the files in the folder of this page:"
    )
    blocks: list[Block] = [
        Text(text),
        Text(f"{cd}firstlight search {file}", "code"),
        Text("To repeat it from scratch, give it another name:"),
        Text(f"{cd}firstlight search {file} name={search.name}-again", "code"),
    ]
    # The settings of the best trial of a population have changed during its training.
    if best is not None and not best.parts:
        words = " \\\n    ".join([f"name={search.name}-best", *format_overrides(best.values)])
        text = (
            "The full recipe with the best setting, without the budget of a trial, with all its seeds and the test "
            "split:"
        )
        blocks += [
            Text(text),
            Text(f"{cd}firstlight run {shlex.quote(str(folder / RECIPE_FILE))} {words}", "code"),
        ]
    resolved = resolved_block("The search, resolved", search.model_dump(mode="json", exclude_none=True))
    return [*blocks, *mlflow_blocks(report.uri, "Its runs, figures and models"), resolved]
