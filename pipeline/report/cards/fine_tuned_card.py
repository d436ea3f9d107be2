"""The model card of a fine-tuned model, and of its exports: classes, preprocessing, scores, and code that predicts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from firstlight.pipeline.report.cards.loading_code import normalisation_code
from firstlight.pipeline.report.cards.markdown import format_code, format_settings, format_table
from firstlight.pipeline.report.cards.model_card import (
    FORMAT_NAMES,
    describe_format,
    describe_input_pixels,
    list_format_files,
)
from firstlight.pipeline.report.cards.prediction_code import model_prediction_code
from firstlight.pipeline.stages.artifacts.encoder_description import read_encoder_spec
from firstlight.pipeline.stages.artifacts.weights_origin import trace_weights
from firstlight.pipeline.stages.export import EXPORT_FOLDER
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FOLDER, Preprocessing, read_model_description
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext

# Hugging Face's names of what a task does.
PIPELINE_TAGS = {"segment": "image-segmentation", "detect": "object-detection"}
CLASSIFICATION_TAG = "image-classification"
ANSWERS = {
    "segment": "a class for every pixel",
    "detect": "boxes with a class and a score",
    "multilabel": "a probability for each of {count} classes, any number of which an image may show",
}
CLASSES_ANSWER = "probabilities of {count} classes, of which an image has one"
# Classes that a card lists; the file lists all.
MAX_CARD_CLASSES = 1000


def write_model_card(
    context: StageContext,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    lineage: Mapping[str, str],
) -> str | None:
    """Writes `model/card.md` of a fine-tuning. Returns its text, None if the file has this text already.

    `siblings`: the instances of the same stage. `rows`: the table of the recipe. `lineage`: MLflow runs and references,
    by role.
    """
    folder = instance.folder / MODEL_FOLDER
    return write_card_file(folder, render_model_card(context, folder, instance, siblings, rows, lineage))


def write_exported_card(
    context: StageContext,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    lineage: Mapping[str, str],
) -> str | None:
    """Writes `export/card.md` of an exported model, as `write_model_card`, with code for every format."""
    assert instance.encoder is not None
    text = render_model_card(context, instance.encoder, instance, siblings, rows, lineage, instance.result)
    return write_card_file(instance.folder / EXPORT_FOLDER, text)


def render_model_card(
    context: StageContext,
    folder: Path,
    instance: StageInstance,
    siblings: Sequence[StageInstance],
    rows: Sequence[ScoreRow],
    lineage: Mapping[str, str],
    exported: Mapping[str, Any] | None = None,
) -> str:
    """Returns the card of the model in `folder`. It contains no path of this machine.

    `exported`: the result of the export whose formats the card tells of; None for the model itself.
    """
    recipe, (description, preprocessing) = context.recipe, read_model_description(folder)
    spec, task = read_encoder_spec(folder), description["task"]["name"]
    origin = trace_weights(recipe, instance.stage, folder)
    own = [row for row in rows if row.arm == description.get("arm")]
    tag = PIPELINE_TAGS.get(task, CLASSIFICATION_TAG)
    return join_sections(
        [
            make_front_matter(recipe, tag, [tag, task], origin, name_library(exported)),
            f"# {recipe.name}: {task} with {name_network(spec)}, seed {name_seed(description)}",
            recipe.description,
            _describe_model(description, spec, preprocessing),
            _describe_preprocessing(preprocessing),
            _describe_fine_tuning(description),
            describe_data(context.store, context, description, "model"),
            describe_seed_scores(recipe, instance, siblings, own, "model"),
            _describe_use() if exported is None else _describe_formats(exported, task, preprocessing, spec),
            describe_lineage(lineage),
            describe_licence(origin),
        ]
    )


def _describe_model(description: Mapping[str, Any], spec: Mapping[str, Any], seen: Preprocessing) -> str:
    classes, task = description["classes"], description["task"]["name"]
    answer = ANSWERS.get(task, CLASSES_ANSWER).format(count=len(classes))
    listed = ", ".join(format_code(name) for name in classes[:MAX_CARD_CLASSES])
    more = f" and {len(classes) - MAX_CARD_CLASSES:,} more" if len(classes) > MAX_CARD_CLASSES else ""
    return (
        f"## What it is\n\nA fine-tuned network, {name_network(spec)} with the layers of the task `{task}`. "
        f"For an image of any size, seen as {seen.image_size} x {seen.image_size} pixels, it gives {answer}.\n\n"
        f"The classes, in the order of its outputs: {listed}{more}.\n\n{format_settings(description['task'])}"
    )


def _describe_preprocessing(seen: Preprocessing) -> str:
    lines = [("size of a view", f"{seen.image_size} x {seen.image_size}")]
    if seen.windows is not None:
        lines += [("views", f"square windows that cover the image: {format_code(json.dumps(seen.windows))}")]
    else:
        for k, ops in enumerate(seen.views):
            stated = [{key: value for key, value in op.items() if value is not None} for op in ops]
            lines += [("view" + (f" {k + 1}" if len(seen.views) > 1 else ""), format_code(json.dumps(stated)))]
    for kind, (black, white) in (seen.levels or {}).items():
        lines += [(kind, f"black is {black:g}, white is {white:g}")]
    taken = "RGB, upright, transparent pixels on white, floats in 0..1"
    if seen.pixels is not None:
        taken = f"Upright, {describe_input_pixels(seen.pixels)}"
    averaged = " Outputs are averaged over the views." if len(seen.views) > 1 or seen.windows else ""
    text = f"{taken}; the network normalises them itself.{averaged}"
    return f"## How it sees an image\n\n{text}\n\n{format_table(('part', 'value'), lines)}"


def _describe_fine_tuning(description: Mapping[str, Any]) -> str:
    facts = {key: description[key] for key in ("arm", "lr", "labels", "seed") if key in description}
    facts |= {"batch_norm": description["batch_norm"]}
    return (
        "## How it was learned\n\nWith labels. `arm` is what the training started from; the learning rate was chosen "
        f"on held-out images.\n\n{format_settings(facts)}"
    )


def _describe_use() -> str:
    return (
        "## How to use it\n\nIn the folder above that of this card, with Firstlight:\n\n"
        "    firstlight predict model image.jpg\n\n"
        "```python\nimport firstlight as fl\n\n"
        'model = fl.load_model("model")\n(answer,) = model.predict(["image.jpg"])\n```\n\n'
        "Instead of the folder, both take `runs:/<run>/model` and the name that the model is registered under. "
        "The folder has safetensors and JSON, and a manifest with the sha256 of each file; nothing in it is unpickled. "
        "A stage `export` with `what: model` writes the model for other software."
    )


def _describe_formats(exported: Mapping[str, Any], task: str, seen: Preprocessing, spec: Mapping[str, Any]) -> str:
    """Returns the code that predicts with each format, its difference from the model, and its files."""
    parts = ["## How to load it", "Run the code in the folder of this card."]
    for format, facts in exported["formats"].items():
        worst = max(facts["difference"].values(), key=lambda found: found["relative"])
        absolute, relative = (f"{worst[key]:.2g}" for key in ("absolute", "relative"))
        code = model_prediction_code(format, facts, task, seen, normalisation_code(spec))
        parts.append(
            f"### {FORMAT_NAMES[format]}\n\nLargest difference from the model: {absolute}, {relative} of its largest "
            f"value.{describe_format(format, facts)}{_describe_graph(format)}\n\n```python\n{code}\n```"
        )
        parts.append(list_format_files(format, facts))
    parts += [f"Not as {FORMAT_NAMES[format]}: {reason}." for format, reason in exported["left_out"].items()]
    return "\n\n".join(parts)


def _describe_graph(format: str) -> str:
    if format != "onnx":
        return ""
    return (
        " The classes and the views are in the file's metadata. The code needs Pillow, numpy and onnxruntime alone; of "
        "images with more than 8 bits or transparent pixels, Firstlight makes other pixels."
    )
