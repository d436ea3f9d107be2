"""The model card of an exported encoder: architecture, training, data, scores, loading code, lineage and licence."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.config.measures import GIVEN_ARM
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS, PixelFormat
from firstlight.pipeline.report.cards.card_parts import (
    describe_data,
    describe_lineage,
    describe_seed_scores,
    join_sections,
    make_front_matter,
    name_library,
    name_network,
    name_seed,
    write_card_file,
)
from firstlight.pipeline.report.cards.licence import describe_licence
from firstlight.pipeline.report.cards.loading_code import loading_code, normalisation_code
from firstlight.pipeline.report.cards.markdown import format_code, format_settings, format_table
from firstlight.pipeline.stages.artifacts.weights_origin import trace_weights
from firstlight.pipeline.stages.export import EXPORT_FOLDER
from firstlight.pipeline.stages.exporting.encoder_origin import read_encoder_origin
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.timm_folder import TIMM_CONFIG_FILE
from firstlight.tasks.pretrain import METHODS

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
    context: StageContext,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    lineage: Mapping[str, str],
) -> str | None:
    """Writes `export/card.md`. Returns its text, None if the file has this text already.

    `siblings`: the instances that score encoders of the same stage. `rows`: the table of the recipe. `lineage`: MLflow
    runs and references, by role.
    """
    return write_card_file(instance.folder / EXPORT_FOLDER, render_card(context, instance, siblings, rows, lineage))


def render_card(
    context: StageContext,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    lineage: Mapping[str, str],
) -> str:
    """Returns the card as Markdown with the front matter of Hugging Face. It contains no path of this machine."""
    assert instance.encoder is not None
    recipe, result, made = context.recipe, instance.result, read_encoder_origin(instance.encoder)
    assert result is not None
    origin = trace_weights(recipe, instance.stage, instance.encoder)
    learned = ["self-supervised"] if "method" in made else []
    tags = ["image-feature-extraction", *learned, *([made["method"]["name"]] if "method" in made else [])]
    return join_sections(
        [
            make_front_matter(recipe, "image-feature-extraction", tags, origin, name_library(result)),
            f"# {recipe.name}: {name_network(recipe.network_spec)}, "
            + (f"seed {name_seed(made)}" if learned or "task" in made else "existing weights"),
            recipe.description,
            _describe_encoder(recipe, result),
            _describe_training(recipe, instance, made),
            describe_data(context.store, context, made),
            describe_seed_scores(recipe, instance, siblings, _select_rows(recipe, instance, rows)),
            _describe_loading(recipe, result),
            describe_lineage(lineage),
            describe_licence(origin),
        ]
    )


def _select_rows(recipe: Recipe, instance: StageInstance, rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Returns the rows of this encoder: without those of the given weights, or those alone if it is the given one."""
    source = recipe.encoder_source(instance.stage)
    is_given = source is not None and source.is_given
    return [row for row in rows if (row.arm == GIVEN_ARM) == is_given]


def _describe_encoder(recipe: Recipe, result: Mapping[str, Any]) -> str:
    channels, height, width = result["map"]
    size = result["image_size"]
    return (
        f"## What it is\n\nAn image encoder, without a classifier: {name_network(recipe.network_spec)}. "
        f"It maps an image of "
        f"{size} x {size} pixels to a feature map of {channels} x {height} x {width}; the mean of the map over its "
        f"positions is the image's {channels} features.\n\n{format_settings(recipe.network_spec)}"
    )


def _describe_training(recipe: Recipe, instance: StageInstance, made: Mapping[str, Any]) -> str:
    """Returns the method, its deviations from the paper, and the budget if it is known."""
    if "task" in made:
        start, seed = format_code(made.get("arm", "unknown")), name_seed(made)
        line = f"## How it was learned\n\nWith labels, by a fine-tuning from {start}, with seed {seed}. The task:"
        return f"{line}\n\n{format_settings(made['task'])}\n\nIts budget is in the MLflow run that made it."
    source = recipe.encoder_source(instance.stage)
    if "method" not in made and source is not None and source.is_given:
        text = "Not by this recipe: these are existing weights as they came; the last section describes them."
        return f"## How it was learned\n\n{text}"
    if made.get("method", {}).get("name") not in METHODS:
        return "## How it was learned\n\nUnknown: the encoder does not name its method."
    spec = made["method"]
    method = METHODS[spec["name"]]
    deviations = "\n".join(f"- {line}" for line in method.deviations)
    parts = [
        f"## How it was learned\n\n{method.title} ({method.paper}), with seed {name_seed(made)}.",
        format_settings({key: value for key, value in spec.items() if key != "name"}),
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
    return f"The budget. {labels}\n\n{format_settings(values)}"


def _describe_loading(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """Returns the code that loads each format, its difference from the encoder, and its files."""
    normalisation = normalisation_code(recipe.network_spec)
    size, pixels = result["image_size"], recipe.dataset.pixels
    channels = (pixels or RGB_PIXELS).channels
    parts = [
        "## How to load it",
        f"Images are {describe_input_pixels(pixels)}, "
        f"cropped to {size} x {size} by `dataset.eval_augment` of the recipe: "
        f"`{json.dumps([op.model_dump(mode='json', exclude_none=True) for op in recipe.dataset.eval_augment])}`. "
        "Run the code in the folder of this card.",
    ]
    for format, facts in result["formats"].items():
        worst = max(facts["difference"].values(), key=lambda found: found["relative"])
        absolute, relative = (f"{worst[key]:.2g}" for key in ("absolute", "relative"))
        difference = f"Largest difference from the encoder: {absolute}, {relative} of its largest value."
        parts.append(
            f"### {FORMAT_NAMES[format]}\n\n{difference}{describe_format(format, facts)}\n\n"
            f"```python\n{loading_code(format, facts, size, normalisation, channels)}\n```"
        )
        parts.append(list_format_files(format, facts))
    parts += [f"Not as {FORMAT_NAMES[format]}: {reason}." for format, reason in result["left_out"].items()]
    return "\n\n".join(parts)


def describe_input_pixels(pixels: PixelFormat | None) -> str:
    """Returns what a network takes as an image."""
    if pixels is None:
        return "RGB, floats in 0..1"
    return f"{pixels} as they are in their files, divided by {pixels.white}: floats in 0..1"


def list_format_files(format: str, facts: Mapping[str, Any]) -> str:
    """Returns a table of the files of an exported format."""
    lines = [
        (format_code(f"{format}/{name}"), its["bytes"], format_code(its["sha256"]))
        for name, its in facts["files"].items()
    ]
    return format_table(("file", "bytes", "sha256"), lines)


def _describe_name(facts: Mapping[str, Any]) -> str:
    """Returns what `timm.create_model` does with the folder of a format, with a space after it; "" for its network."""
    if reason := facts.get("not_by_name"):
        return f"`timm.create_model` cannot load the folder by its name: {format_code(reason)}. "
    if TIMM_CONFIG_FILE not in facts.get("files", {}):
        return ""
    maps = (
        "`timm.create_model` gives the list of its maps (`features_only`), since timm's network has layers after the "
        "last map. "
    )
    hub = '`firstlight push` puts these files at the top as well: `timm.create_model("hf-hub:<owner>/<name>")`. '
    return (maps if facts.get("gives_maps") else "") + hub


def describe_format(format: str, facts: Mapping[str, Any]) -> str:
    """Returns sentences about an exported format, with a space before them."""
    if format in ("torchvision", "timm"):
        missing = facts.get("missing", [])
        named = ", ".join(format_code(name) for name in missing[:4]) + (
            f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        )
        return (
            f" Compared with {FORMAT_NAMES[format]} {facts['version']}. "
            + (f"The network's head is not in the file: {named}. " if missing else "")
            + _describe_name(facts)
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
    return " Spec and weights, with a manifest of sha256 sums; the normalisation is part of the network."
