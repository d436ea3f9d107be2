"""Parts that all model cards have: front matter, tables, the data, the scores and the licence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.report.cards.licence import list_licence_fields
from firstlight.pipeline.report.cards.markdown import format_code, format_front_matter, format_table
from firstlight.pipeline.report.score_table import format_spread, score_cells
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.terminal import escape_text
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.timm_folder import TIMM_CONFIG_FILE

CARD_FILE = "card.md"


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


def make_front_matter(
    recipe: Recipe, pipeline_tag: str, tags: Sequence[str], origin: Mapping[str, str], library: str = "firstlight"
) -> str:
    """Returns the front matter of Hugging Face.

    `origin`: what is known of the existing weights that the network comes from. `library`: what loads the files.
    """
    fields = {**list_licence_fields(origin), "library_name": library, "pipeline_tag": pipeline_tag, "tags": list(tags)}
    return format_front_matter({**fields, "datasets": [recipe.dataset.name]})


def name_library(exported: Mapping[str, Any] | None) -> str:
    """Returns the library that a hub names for an export: timm where it loads the files by the name of their folder."""
    formats = (exported or {}).get("formats", {})
    return "timm" if TIMM_CONFIG_FILE in formats.get("timm", {}).get("files", {}) else "firstlight"


def name_network(spec: Mapping[str, Any]) -> str:
    """Returns what a card calls the network of a spec."""
    return f"{spec['model']} of {spec['name']}" if "model" in spec else str(spec["name"])


def name_seed(made: Mapping[str, Any]) -> str:
    """Returns the seed among the facts about how a network was made."""
    seed = made.get("seed")
    return str(seed) if isinstance(seed, int) else "unknown"


def describe_lineage(lineage: Mapping[str, str]) -> str:
    """Returns the section about MLflow: its runs and references, by role."""
    lines = [(part, format_code(reference)) for part, reference in lineage.items()]
    return "## Lineage\n\n" + format_table(("part", "MLflow"), lines)


def describe_data(store: Store, context: StageContext, made: Mapping[str, Any], what: str = "encoder") -> str:
    """Returns the section about the images. `made`: how the network was made, with the hash of its `store`."""
    splits = context.splits
    kind = store.source.get("kind", context.recipe.dataset.source)
    held_out = "" if store.splits.get("val") else " of these"
    lines = [
        ("data set", f"{format_code(context.recipe.dataset.name)} (source: {kind})"),
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
        f"\n\nThe {what} was learned from another store, {format_code(str(made['store']))}; the scores below are of "
        "the store above."
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
