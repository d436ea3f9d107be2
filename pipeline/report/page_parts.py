"""Parts that the report of a run and the report of a search share."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.image_statistics import describe_shrinking
from firstlight.pipeline.data.manifest import DAMAGE_ERRORS, QUARANTINE_FILE
from firstlight.pipeline.data.parquet import read_parquet_table
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import one_line
from firstlight.pipeline.report.html_page import (
    Block,
    Cell,
    Facts,
    Fold,
    Gallery,
    Notes,
    Picture,
    Table,
    Text,
    Tone,
    format_date,
    strip_credentials,
)
from firstlight.pipeline.report.score_table import (
    arm_cells,
    arm_titles,
    list_compared_rows,
    score_cells,
    score_title,
    table_cells,
    table_headings,
)
from firstlight.pipeline.report.scores.arm_scores import (
    arm_columns,
    describe_comparison,
    group_by_measure,
    has_arm_columns,
)
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.tracking.figures import list_figures
from firstlight.pipeline.tracking.run_file import read_run_id

REPORT_FILE, RECIPE_FILE = "report.html", "recipe.yaml"
# The folder of the figures about a whole run.
SUMMARY_FOLDER = "summary"
# Images that cannot be decoded and are listed one by one.
MAX_LISTED_IMAGES = 10

VERDICT_TONES: dict[str, Tone] = {"helps": "good", "hurts": "bad"}
SCORE_HEADINGS = {"pretraining": "verdict", "without": "against", "difference": "above paper"}


def describe_error(error: BaseException) -> str:
    """Returns the message of a report about the error that ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return "The run was stopped from outside; the same command resumes it."
    return one_line(error, limit=None) or type(error).__name__


def error_blocks(error: str | None) -> list[Block]:
    return [Notes([error], "error")] if error is not None else []


def warning_blocks(lines: Sequence[str]) -> list[Block]:
    return [Notes(lines)] if lines else [Text("None.", "quiet")]


def figure_blocks(folder: Path) -> list[Block]:
    """Returns the gallery of the figures in the folder of a stage and seed, [] if there are none."""
    found = [Picture(file, entry.title, entry.alt) for file, entry in list_figures(folder)]
    return [Gallery(found)] if found else []


def describe_run(folder: Path, missing: str = "") -> str:
    """Returns `run <id>` with the MLflow run of a folder, `missing` if it has none."""
    run_id = read_run_id(folder)
    return f"run {run_id}" if run_id else missing


def score_blocks(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[Block]:
    """Returns the tables that are printed at the end of a run, as tables of a page."""
    if has_arm_columns(rows):
        return [_arm_score_table(recipe, rows), _comparison_table(recipe, rows)]
    titles = table_headings(recipe, rows)
    heads = [heading for heading in titles if heading not in ("stage", "without")]
    lines = [[_score_cell(heading, cells) for heading in heads] for cells in table_cells(recipe, rows)]
    numbers = [k for k, heading in enumerate(heads) if heading not in ("measure", "pretraining")]
    shown = [SCORE_HEADINGS.get(titles[heading], titles[heading]) for heading in heads]
    return [Table(score_title(recipe).capitalize(), shown, lines, numbers)]


def _arm_score_table(recipe: Recipe, rows: Sequence[ScoreRow]) -> Table:
    columns = arm_columns(rows)
    lines: list[list[str | Cell]] = [
        [Cell(scores.label, remark=scores.stage), *arm_cells(columns, scores)] for scores in group_by_measure(rows)
    ]
    heads = ["measure", *(heading for heading, _ in columns)]
    return Table(arm_titles(recipe)[0].capitalize(), heads, lines, range(1, len(heads)))


def _comparison_table(recipe: Recipe, rows: Sequence[ScoreRow]) -> Table:
    paper = ["paper", "difference"] if recipe.expected else []
    lines: list[list[str | Cell]] = []
    for row in list_compared_rows(recipe, rows):
        cells = score_cells(recipe, row)
        values = [Cell(cells[heading]) for heading in ("gain", *paper)]
        named = Cell(row.label or row.measure, remark=row.stage)
        lines.append([named, describe_comparison(row), *values, _score_cell("pretraining", cells)])
    heads = ["measure", "comparison", "gain", *(SCORE_HEADINGS.get(head, head) for head in paper), "verdict"]
    return Table(arm_titles(recipe)[1].capitalize(), heads, lines, range(2, len(heads) - 1))


def _score_cell(heading: str, row: Mapping[str, str]) -> Cell:
    tone: Tone = VERDICT_TONES.get(row[heading], "unsure") if heading == "pretraining" and row[heading] else ""
    return Cell(row[heading], tone, {"measure": row["stage"], "baseline": row["without"]}.get(heading, ""))


def data_blocks(data: DatasetOptions, store: Store, splits: Splits, prepared: Path) -> list[Block]:
    """Returns facts and figures about the images. `prepared`: the folder of the prepare stage, which has figures."""
    copies, test_copies = (f"{store.images['duplicates'][key]:,}" for key in ("copies", "of_train_in_test"))
    facts = [
        ("data set", f"{data.name} ({store.source.get('kind', data.source)})"),
        *(("read as" if not k else "", line) for k, line in enumerate(store.source.get("reading", ()))),
        ("images", splits.describe_counts(bool(store.splits.get("val")))),
        ("size", f"{data.image_size} x {data.image_size} pixels, as the networks see them"),
        ("classes", f"{len(store.classes):,}" if store.classes else "none: no labels"),
        ("cannot be decoded", f"{store.quarantined:,} images"),
        *(("stored", line) for line in describe_shrinking(store.images, sum(store.splits.values()))),
        ("copies", f"{copies} images, {test_copies} of them test images that are also in train"),
        ("store", str(store.path)),
        ("sha256", store.hash),
    ]
    return [Facts(facts), *quarantine_blocks(store.path / QUARANTINE_FILE), *figure_blocks(prepared)]


def quarantine_blocks(file: Path) -> list[Block]:
    """Returns the first images that cannot be decoded, with the reasons, by the `file` of a store that lists them."""
    try:
        rows = read_parquet_table(file).to_pylist()
    except DAMAGE_ERRORS:
        return []
    if not rows:
        return []
    listed = [[str(row["path"]), str(row["split"]), str(row["reason"])] for row in rows[:MAX_LISTED_IMAGES]]
    table = Table(f"The first {len(listed)}", ("path", "split", "reason"), listed)
    return [Fold(f"{len(rows):,} images that cannot be decoded", [table])]


def mlflow_blocks(uri: str, content: str) -> list[Block]:
    """Returns the command that opens MLflow's pages. `content`: the things that are in MLflow."""
    return [Text(f"{content}, in MLflow:"), Text(f"mlflow ui --backend-store-uri {strip_credentials(uri)}", "code")]


def resolved_block(heading: str, config: Mapping[str, Any]) -> Fold:
    """Returns a folded block with a config as YAML, without the passwords that addresses may contain."""
    return Fold(heading, [Text(strip_credentials(yaml_reader.dump_yaml(dict(config))), "code")])


def footer_text(uri: str) -> str:
    written = f"Written by Firstlight on {format_date(time.time())}."
    return f"{written} Everything on this page is also in MLflow: {strip_credentials(uri)}"
