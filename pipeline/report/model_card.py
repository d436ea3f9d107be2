"""The model card of an exported encoder: architecture, training, data, scores, loading code, lineage and licence."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.report.loading_code import loading_code, normalisation_code
from firstlight.pipeline.report.score_table import format_spread, score_cells
from firstlight.pipeline.stages.export import EXPORT_FOLDER, read_encoder_origin
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.terminal import escape_text
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.pretrain import METHODS

CARD_FILE = "card.md"
# The keys of the length of a training, one of which is given.
LENGTH_KEYS = ("epochs", "steps")
# The keys of a pretraining that say how long it trained, and on how many labels.
BUDGET_KEYS = (
    *LENGTH_KEYS,
    "batch_size",
    "optimizer",
    "schedule",
    "precision",
    "labelled_per_batch",
    "labels_per_class",
)
FORMAT_NAMES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "safetensors": "Firstlight",
    "onnx": "ONNX",
    "torch_export": "torch.export",
}


def write_card(
    worker: StageContext,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    lineage: Mapping[str, str],
) -> str | None:
    """Writes `export/card.md`. Returns its text, None if the file has this text already.

    `siblings`: the instances that score encoders of the same stage. `rows`: the table of the recipe. `lineage`: MLflow
    runs and references, by role.
    """
    file = instance.folder / EXPORT_FOLDER / CARD_FILE
    text = escape_text(render_card(worker, instance, siblings, rows, lineage))
    if file.exists() and file.read_text("utf-8") == text:
        return None
    write_atomically(file, text.encode())
    return text


def render_card(
    worker: StageContext,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    lineage: Mapping[str, str],
) -> str:
    """Returns the card as Markdown with the front matter of Hugging Face. It contains no path of this machine."""
    assert instance.encoder is not None
    recipe, result, made = worker.recipe, instance.result, read_encoder_origin(instance.encoder)
    assert result is not None
    sections = [
        _format_front_matter(recipe, made),
        f"# {recipe.name}: {_name_network(recipe)}, seed {made.get('seed', 'unknown')}",
        recipe.description,
        _describe_encoder(recipe, result),
        _describe_training(recipe, instance, made),
        _describe_data(worker.store, worker, made),
        _describe_scores(recipe, instance, siblings, rows),
        _describe_loading(recipe, result),
        "## Lineage\n\n"
        + _markdown_table(("part", "MLflow"), [(part, f"`{reference}`") for part, reference in lineage.items()]),
        "## Licence and limits\n\nThe code of Firstlight is licensed under Apache-2.0. The licence of these weights is "
        "unknown: it depends on the licence of the images that they were learned from, which the run does not know. "
        "The images were not examined for biases. The numbers above hold for the data set above only.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _format_front_matter(recipe: Recipe, made: Mapping[str, Any]) -> str:
    """Returns the front matter. Its values are written as JSON, which is YAML with every text quoted."""
    learned = [] if "task" in made else ["self-supervised"]
    tags = ["image-feature-extraction", *learned, *([made["method"]["name"]] if "method" in made else [])]
    fields = {
        "license": "unknown",
        "library_name": "firstlight",
        "pipeline_tag": "image-feature-extraction",
        "tags": tags,
    }
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in {**fields, "datasets": [recipe.dataset.name]}.items()),
            "---",
        ]
    )


def _name_network(recipe: Recipe) -> str:
    spec = recipe.encoder.model_dump()
    return f"{spec['model']} of {spec['name']}" if "model" in spec else str(spec["name"])


def _describe_encoder(recipe: Recipe, result: Mapping[str, Any]) -> str:
    channels, height, width = result["map"]
    size = result["image_size"]
    return (
        f"## What it is\n\nAn image encoder, without a classifier: {_name_network(recipe)}. It maps an image of "
        f"{size} x {size} pixels to a feature map of {channels} x {height} x {width}; the mean of the map over its "
        f"positions is the image's {channels} features.\n\n{_settings_table(recipe.encoder.model_dump(mode='json'))}"
    )


def _settings_table(values: Mapping[str, Any]) -> str:
    return _markdown_table(
        ("setting", "value"), [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in values.items()]
    )


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    body = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
        for line in (heads, ["---"] * len(heads), *lines)
    ]
    return "\n".join(body)


def _describe_training(recipe: Recipe, instance: StageInstance, made: Mapping[str, Any]) -> str:
    """Returns the method, its deviations from the paper, and the budget if it is known."""
    if "task" in made:
        start, seed = made.get("arm", "unknown"), made.get("seed", "unknown")
        line = f"## How it was learned\n\nWith labels, by a fine-tuning from `{start}`, with seed {seed}. The task:"
        return f"{line}\n\n{_settings_table(made['task'])}\n\nIts budget is in the MLflow run that made it."
    if made.get("method", {}).get("name") not in METHODS:
        return "## How it was learned\n\nUnknown: the encoder does not name its method."
    spec = made["method"]
    method = METHODS[spec["name"]]
    deviations = "\n".join(f"- {line}" for line in method.deviations)
    parts = [
        f"## How it was learned\n\n{method.title} ({method.paper}), with seed {made.get('seed', 'unknown')}.",
        _settings_table({key: value for key, value in spec.items() if key != "name"}),
        f"Known differences from the paper, and values that it does not give:\n\n{deviations}",
        _describe_budget(_find_pretraining(recipe, instance)),
    ]
    return "\n\n".join(parts)


def _find_pretraining(recipe: Recipe, instance: StageInstance) -> StageConfig | None:
    """Returns the stage that made the encoder, None if the recipe takes the encoder from MLflow."""
    source = recipe.encoder_source(instance.stage)
    return recipe.stages[source.stage] if source is not None and source.stage is not None else None


def _describe_budget(stage: StageConfig | None) -> str:
    if stage is None:
        return "Its budget is in the MLflow run that made it."
    values = stage.model_dump(mode="json", include=set(BUDGET_KEYS))
    values = {key: value for key, value in values.items() if key not in LENGTH_KEYS or value is not None}
    labels = (
        "Labels were seen: see labelled_per_batch and labels_per_class."
        if values.get("labelled_per_batch")
        else "No label was seen."
    )
    return f"The budget. {labels}\n\n{_settings_table(values)}"


def _describe_data(store: Store, worker: StageContext, made: Mapping[str, Any]) -> str:
    splits = worker.splits
    lines = [
        (
            "data set",
            f"`{worker.recipe.dataset.name}` (source: {store.source.get('kind', worker.recipe.dataset.source)})",
        ),
        (
            "images",
            f"{len(splits.train):,} to train on, {len(splits.val):,} held out"
            f"{'' if store.splits.get('val') else ' of these'}, "
            f"{len(splits.test):,} to test on",
        ),
        ("classes", len(store.classes) or "none: no labels"),
        ("quarantined", f"{store.quarantined:,} images that cannot be decoded"),
        ("sha256 of the store", f"`{store.hash}`"),
    ]
    other = made.get("store") not in (None, store.hash)
    note = (
        f"\n\nThe encoder was learned from another store, `{made['store']}`; the scores below are of the store above."
        if other
        else ""
    )
    return f"## Data\n\n{_markdown_table(('property', 'value'), lines)}{note}"


def _describe_scores(
    recipe: Recipe, instance: StageInstance, siblings: Sequence[StageInstance], rows: Sequence[ScoreRow]
) -> str:
    """Returns the test scores of this encoder and of its baselines, and the mean gain over all seeds."""
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
    heads = ("stage", "measure", "this encoder", "without pretraining", "mean gain, seeds")
    caption = (
        "Test scores of one seed (%), and the mean gain over all seeds of the recipe with its confidence interval. "
        "The intervals hold for all rows of the recipe's table together."
    )
    return f"## Scores\n\n{caption}\n\n{_markdown_table(heads, lines)}"


def _describe_loading(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """Returns the code that loads each format, its difference from the encoder, and its files."""
    normalisation = normalisation_code(recipe.encoder.model_dump(mode="json"))
    size = result["image_size"]
    parts = [
        "## How to load it",
        f"Images are RGB, floats in 0..1, cropped to {size} x {size} by `dataset.eval_augment` of the recipe: "
        f"`{json.dumps([op.model_dump(mode='json', exclude_none=True) for op in recipe.dataset.eval_augment])}`. "
        "Run the code in the folder of this card.",
    ]
    for format, facts in result["formats"].items():
        worst = max(facts["difference"].values(), key=lambda found: found["relative"])
        absolute, relative = (f"{worst[key]:.2g}" for key in ("absolute", "relative"))
        difference = f"Largest difference from the encoder: {absolute}, {relative} of its largest value."
        parts.append(
            f"### {FORMAT_NAMES[format]}\n\n{difference}{_describe_format(format, facts)}\n\n"
            f"```python\n{loading_code(format, facts, size, normalisation)}\n```"
        )
        parts.append(
            _markdown_table(
                ("file", "bytes", "sha256"),
                [(f"`{format}/{n}`", f["bytes"], f"`{f['sha256']}`") for n, f in facts["files"].items()],
            )
        )
    parts += [f"Not as {FORMAT_NAMES[format]}: {reason}." for format, reason in result["left_out"].items()]
    return "\n\n".join(parts)


def _describe_format(format: str, facts: Mapping[str, Any]) -> str:
    if format in ("torchvision", "timm"):
        missing = facts["missing"]
        named = ", ".join(f"`{name}`" for name in missing[:4]) + (
            f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        )
        return (
            f" Compared with {FORMAT_NAMES[format]} {facts['version']}. "
            + (f"The network's head is not in the file: {named}. " if missing else "")
            + "The normalisation is not part of the state dict: the code below applies it."
        )
    if format == "onnx":
        return (
            f" Opset {facts['opset']}; compared by onnxruntime {facts['version']}. The normalisation is in the graph; "
            "the batch size is free."
        )
    if format == "torch_export":
        return (
            f" Written by torch {facts['version']}, and compared before it was written. The normalisation is in the "
            "graph; the batch size is free. torch.export.load may unpickle parts of a file: check its sha256."
        )
    return " Spec and weights, with a manifest of sha256 sums; the normalisation is part of the encoder."
