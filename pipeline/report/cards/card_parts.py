"""Parts that all model cards have: front matter, tables, the data, the scores and the licence."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.report.score_table import format_spread, score_cells
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.terminal import escape_text
from firstlight.pipeline.train.context import StageContext

CARD_FILE = "card.md"
LICENCE_SECTION = (
    "## Licence and limits\n\nThe code of Firstlight is licensed under Apache-2.0. The licence of these weights is "
    "unknown: it depends on the licence of the images that they were learned from, which the run does not know. "
    "The images were not examined for biases. The numbers above hold for the data set above only."
)


def write_card_file(folder: Path, text: str) -> str | None:
    """Writes a card into a folder. Returns its text, None if the file has this text already."""
    file, text = folder / CARD_FILE, escape_text(text)
    if file.exists() and file.read_text("utf-8") == text:
        return None
    write_atomically(file, text.encode())
    return text


def join_sections(sections: Sequence[str]) -> str:
    """Returns the text of a card without the sections that are empty."""
    return "\n\n".join(section for section in sections if section) + "\n"


def format_front_matter(recipe: Recipe, pipeline_tag: str, tags: Sequence[str]) -> str:
    """Returns the front matter of Hugging Face. Its values are JSON, which is YAML with every text quoted."""
    fields = {"license": "unknown", "library_name": "firstlight", "pipeline_tag": pipeline_tag, "tags": list(tags)}
    values = {**fields, "datasets": [recipe.dataset.name]}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def name_network(spec: Mapping[str, Any]) -> str:
    """Returns what a card calls the network of a spec."""
    return f"{spec['model']} of {spec['name']}" if "model" in spec else str(spec["name"])


def format_settings(values: Mapping[str, Any]) -> str:
    """Returns a table of keys and values, as JSON."""
    return format_table(("setting", "value"), [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in values.items()])


def format_table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    body = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
        for line in (heads, ["---"] * len(heads), *lines)
    ]
    return "\n".join(body)


def describe_lineage(lineage: Mapping[str, str]) -> str:
    """Returns the section about MLflow: its runs and references, by role."""
    lines = [(part, f"`{reference}`") for part, reference in lineage.items()]
    return "## Lineage\n\n" + format_table(("part", "MLflow"), lines)


def describe_data(store: Store, worker: StageContext, made: Mapping[str, Any], what: str = "encoder") -> str:
    """Returns the section about the images. `made`: how the network was made, with the hash of its `store`."""
    splits = worker.splits
    kind = store.source.get("kind", worker.recipe.dataset.source)
    held_out = "" if store.splits.get("val") else " of these"
    lines = [
        ("data set", f"`{worker.recipe.dataset.name}` (source: {kind})"),
        (
            "images",
            f"{len(splits.train):,} to train on, {len(splits.val):,} held out{held_out}, "
            f"{len(splits.test):,} to test on",
        ),
        ("classes", len(store.classes) or "none: no labels"),
        ("quarantined", f"{store.quarantined:,} images that cannot be decoded"),
        ("sha256 of the store", f"`{store.hash}`"),
    ]
    other = made.get("store") not in (None, store.hash)
    note = (
        f"\n\nThe {what} was learned from another store, `{made['store']}`; the scores below are of the store above."
        if other
        else ""
    )
    return f"## Data\n\n{format_table(('property', 'value'), lines)}{note}"


def describe_seed_scores(
    recipe: Recipe,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    what: str = "encoder",
) -> str:
    """Returns the test scores of this network and of its baselines, and the mean gain over all seeds."""
    seeds: dict[str, list[int]] = {}
    for sibling in siblings:
        seeds.setdefault(sibling.stage, []).append(sibling.seed)
    found = [row for row in rows if row.stage in seeds]
    if not found:
        return "## Scores\n\nNot measured in this recipe."
    lines = []
    for row in found:
        position = seeds[row.stage].index(instance.seed)
        cells = score_cells(recipe, row)
        own = slice(position, position + 1)
        baseline = f"{format_spread(row.baseline[own], row.scale)} ({row.against})" if row.baseline else ""
        gain = f"{cells['gain']} over {len(row.gain)}: {cells['pretraining']}" if row.baseline else ""
        lines.append((row.stage, row.measure, format_spread(row.pretrained[own], row.scale), baseline, gain))
    heads = ("stage", "measure", f"this {what}", "without pretraining", "mean gain, seeds")
    caption = (
        "Test scores of one seed (%), and the mean gain over all seeds of the recipe with its confidence interval. "
        "The intervals hold for all rows of the recipe's table together."
    )
    return f"## Scores\n\n{caption}\n\n{format_table(heads, lines)}"
