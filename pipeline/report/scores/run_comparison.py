"""Runs of recipes side by side: their scores, what the later ones gained over the first, and their settings."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from rich.console import Group, RenderableType
from rich.text import Text as RichText

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.records import RecordShape, check_shape
from firstlight.pipeline.report.html_page import (
    Block,
    Cell,
    Facts,
    Notes,
    Page,
    PageSection,
    Table,
    Text,
    Tone,
    format_date,
    render_page,
)
from firstlight.pipeline.report.score_table import format_gain, format_spread
from firstlight.pipeline.stages.verdicts import MIN_SEEDS, Verdict, judge_gains
from firstlight.pipeline.terminal import Column, build_table, format_count
from firstlight.pipeline.tracking.lineage import Lineage, Run
from firstlight.pipeline.tracking.references import read_json_artifact

TABLE_FILE, RECIPE_RECORD = "table.json", "recipe.json"
# Settings that say where a run is kept, not what it does.
PLACE_KEYS = ("name", "description", "storage", "tracking", "needs", "expected")


class _RowShape(RecordShape):
    """A row of a run's table, as far as a comparison needs it. Scores are as measured, such as 0.5."""

    stage: str
    measure: str
    pretrained: list[float | None]
    baseline: list[float | None]
    against: str


_TABLE_SHAPE = TypeAdapter(list[_RowShape])
_RECIPE_SHAPE = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class ComparedRun:
    """A run with its scores by (stage, measure, arm), and its settings by dotted key.

    The arm is `pretrained`, or the name of the baseline.
    """

    run: Run
    seeds: tuple[int, ...]
    scores: Mapping[tuple[str, str, str], np.ndarray]
    settings: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{self.run.name} ({self.run.short_id})"


@dataclass(frozen=True)
class RunComparison:
    """Runs, the first of which the others are compared with."""

    runs: tuple[ComparedRun, ...]

    @property
    def keys(self) -> list[tuple[str, str, str]]:
        """The (stage, measure, arm) of all scores, in the order of the first run that has them."""
        return list(dict.fromkeys(key for one in self.runs for key in one.scores))

    @property
    def shared_seeds(self) -> tuple[int, ...]:
        """The seeds that all runs have, by which scores are paired."""
        common = set.intersection(*(set(one.seeds) for one in self.runs))
        return tuple(sorted(common))

    @property
    def is_same_data(self) -> bool:
        """True if all runs read the same images."""
        return len({one.run.store for one in self.runs}) == 1

    def list_differences(self) -> list[tuple[str, list[str]]]:
        """Returns the settings that differ, by dotted key, with the value of each run."""
        keys = sorted({key for one in self.runs for key in one.settings})
        values = {key: [one.settings.get(key, "–") for one in self.runs] for key in keys}
        return [(key, found) for key, found in values.items() if len(set(found)) > 1]

    def find_verdicts(self, other: int) -> dict[tuple[str, str, str], tuple[float, Verdict]]:
        """Returns the mean gain of run `other` over the first, in percent, with its verdict, for each score of both.

        Seeds are paired, and the verdicts are corrected for the number of rows.
        """
        first, second = self.runs[0], self.runs[other]
        keys = [key for key in self.keys if key in first.scores and key in second.scores]
        seeds = self.shared_seeds
        gains = [100.0 * (_select(second, key, seeds) - _select(first, key, seeds)) for key in keys] if seeds else []
        return {
            key: (float(gain.mean()), verdict)
            for key, gain, verdict in zip(keys, gains, judge_gains(gains), strict=False)
        }


def _select(one: ComparedRun, key: tuple[str, str, str], seeds: Sequence[int]) -> np.ndarray:
    return one.scores[key][[one.seeds.index(seed) for seed in seeds]]


def read_comparison(lineage: Lineage, names: Sequence[str]) -> RunComparison:
    """Reads the runs of recipes that `names` identify, as `firstlight show` does.

    Raises:
        UserError: there is no such run, it is no recipe or has no table, two names mean the same run, or what MLflow
            has of it is damaged.
    """
    runs = [lineage.find_run(name) for name in names]
    for name, run in zip(names, runs, strict=True):
        if run.kind not in ("recipe", "retrain"):
            raise UserError(f"run: {name!r} is a run of the kind {run.kind}; valid: a recipe, by its name or id")
        if runs.count(run) > 1:
            raise UserError(f"run: {name!r} is named twice, as {run.id}; valid: different runs, by their ids")
    return RunComparison(tuple(_read_run(run) for run in runs))


def _read_run(run: Run) -> ComparedRun:
    where = f"run: {run.name} ({run.short_id})"
    try:
        table, recipe = (read_json_artifact(run, name) for name in (TABLE_FILE, RECIPE_RECORD))
    # MLflow raises many kinds of errors for a file that is missing.
    except Exception as error:
        raise UserError(f"{where}: has no table of scores; run it to its end first ({type(error).__name__})") from None
    rows: list[dict[str, Any]] = table.get("rows") if isinstance(table, dict) else None  # type: ignore[assignment]
    check_shape(rows, _TABLE_SHAPE, f"{where}, {TABLE_FILE}")
    check_shape(recipe, _RECIPE_SHAPE, f"{where}, {RECIPE_RECORD}")
    scores = dict[tuple[str, str, str], np.ndarray]()
    for row in rows:
        for arm, values in (("pretrained", row["pretrained"]), (row["against"], row["baseline"])):
            if values:
                found = np.array([np.nan if value is None else value for value in values], float)
                scores.setdefault((row["stage"], row["measure"], arm), found)
    settings = dict(_flatten_settings({key: value for key, value in recipe.items() if key not in PLACE_KEYS}))
    return ComparedRun(run, tuple(recipe.get("seeds", (0,))), scores, settings)


def _flatten_settings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten_settings(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(value)


def _format_score(one: ComparedRun, key: tuple[str, str, str]) -> str:
    return format_spread(one.scores[key]) if key in one.scores else "–"


def _name_effect(verdict: Verdict) -> str:
    return {"helps": "better", "hurts": "worse"}.get(verdict.text, verdict.text)


def build_comparison_view(comparison: RunComparison) -> RenderableType:
    """Returns the scores side by side, the gains over the first run, and the settings that differ, for the terminal."""
    titles = [one.title for one in comparison.runs]
    columns = [Column("stage"), Column("measure"), Column("arm"), *(Column(title, numeric=True) for title in titles)]
    rows = [[*key, *(_format_score(one, key) for one in comparison.runs)] for key in comparison.keys]
    parts: list[RenderableType] = [build_table(columns, rows, "test scores (%)", grid=True)]
    for number, title in enumerate(titles[1:], 1):
        verdicts = comparison.find_verdicts(number)
        lines = [[*key, format_gain(*found), _name_effect(found[1])] for key, found in verdicts.items()]
        heads = [Column("stage"), Column("measure"), Column("arm"), Column("gain", numeric=True), Column("it is")]
        parts.append(build_table(heads, lines, f"{title} over {titles[0]}", grid=True))
    differences = comparison.list_differences()
    heads = [Column("setting"), *(Column(title) for title in titles)]
    parts.append(build_table(heads, [[key, *values] for key, values in differences], "settings that differ", grid=True))
    parts += [RichText(line, style="yellow") for line in list_cautions(comparison)]
    return Group(*parts)


def list_cautions(comparison: RunComparison) -> list[str]:
    """Returns sentences about what makes the runs hard to compare."""
    found = []
    if not comparison.is_same_data:
        found.append("The runs read different images: a difference of their scores may be one of the images.")
    if (seeds := len(comparison.shared_seeds)) < MIN_SEEDS:
        found.append(f"The runs share {format_count(seeds, 'seed')}: three are needed for a verdict.")
    return found


def render_comparison(comparison: RunComparison) -> str:
    """Returns the comparison as a page."""
    titles = [one.title for one in comparison.runs]
    score_rows: list[list[str | Cell]] = [
        [Cell(measure, remark=f"{stage}, {arm}"), *(_format_score(one, key) for one in comparison.runs)]
        for key in comparison.keys
        for stage, measure, arm in [key]
    ]
    scores: list[Block] = [Notes(list_cautions(comparison))] if list_cautions(comparison) else []
    caption, heads = "Test scores in percent, mean and standard deviation over seeds", ["measure", *titles]
    scores.append(Table(caption, heads, score_rows, range(1, len(heads))))
    gains: list[Block] = []
    for number, title in enumerate(titles[1:], 1):
        rows: list[list[str | Cell]] = [
            [Cell(key[1], remark=f"{key[0]}, {key[2]}"), format_gain(gain, verdict), _tone_cell(verdict)]
            for key, (gain, verdict) in comparison.find_verdicts(number).items()
        ]
        caption = f"{title} over {titles[0]}: mean gain in points, with the interval that holds for all rows together"
        gains.append(Table(caption, ["measure", "gain", "it is"], rows, (1,)))
    differing = comparison.list_differences()
    settings: Block = (
        Table("", ["setting", *titles], [[key, *values] for key, values in differing])
        if differing
        else Text("None.", "quiet")
    )
    facts = [
        (one.title, f"{format_date(one.run.start)}, {len(one.seeds)} seeds, images {one.run.store[:12]}")
        for one in comparison.runs
    ]
    page = Page(
        " and ".join(one.run.name for one in comparison.runs),
        "A comparison of runs",
        "",
        [
            PageSection("Scores", scores),
            PageSection("Gains", gains),
            PageSection("Settings that differ", [settings]),
            PageSection("Runs", [Facts(facts)]),
        ],
        foot=f"Written by Firstlight on {format_date(time.time())}.",
    )
    return render_page(page)


def _tone_cell(verdict: Verdict) -> Cell:
    tones: dict[str, Tone] = {"helps": "good", "hurts": "bad"}
    return Cell(_name_effect(verdict), tones.get(verdict.text, "unsure"))
