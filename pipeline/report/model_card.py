"""The model card of an exported encoder: what it is, what it was learned from and how, what it was worth, and how to load it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.stages.export import EXPORT_FOLDER, read_encoder_origin
from firstlight.pipeline.stages.pretrain import Pretrain
from firstlight.pipeline.stages.score_rows import score_rows
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.input_normalization import SharedEncoderOptions
from firstlight.tasks.pretrain import METHODS

CARD = "card.md"
NAMES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "safetensors": "Firstlight",
    "onnx": "ONNX",
    "torch_export": "torch.export",
}


def write(
    worker: StageContext, instance: StageInstance, siblings: Sequence[StageInstance], lineage: Mapping[str, str]
) -> str | None:
    """Write `export/card.md`; its text, or None where it stands there already.

    `siblings`: instances that score encoders of the same stage. `lineage`: MLflow runs and references by what they are.
    """
    file = instance.folder / EXPORT_FOLDER / CARD
    text = render(worker, instance, siblings, lineage)
    if file.exists() and file.read_text("utf-8") == text:
        return None
    write_atomically(file, text.encode())
    return text


def render(
    worker: StageContext, instance: StageInstance, siblings: Sequence[StageInstance], lineage: Mapping[str, str]
) -> str:
    """The card as Markdown, with the front matter of Hugging Face's. Names no path of this machine."""
    assert instance.encoder is not None
    recipe, result, made = worker.recipe, instance.result, read_encoder_origin(instance.encoder)
    assert result is not None
    sections = [
        _front(recipe, made),
        f"# {recipe.name}: {_network(recipe)}, seed {made.get('seed', 'unknown')}",
        recipe.description,
        _what(recipe, result),
        _how(recipe, instance, made),
        _data(worker.store, worker, made),
        _worth(recipe, instance, siblings),
        _loading(recipe, result),
        "## Lineage\n\n"
        + _table(("what", "MLflow"), [(what, f"`{reference}`") for what, reference in lineage.items()]),
        "## Licence and limits\n\nThe licence of these weights is unknown: it depends on the images that they were learned from, whose licence the "
        "run does not know. Nothing is known of biases in the images; none was looked for. The numbers above hold for the data set above only.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(recipe: Recipe, made: Mapping[str, Any]) -> str:
    """JSON is YAML: texts are quoted whatever is in them."""
    tags = ["image-feature-extraction", "self-supervised", *([made["method"]["name"]] if "method" in made else [])]
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


def _network(recipe: Recipe) -> str:
    spec = recipe.encoder.model_dump()
    return f"{spec['model']} of {spec['name']}" if "model" in spec else str(spec["name"])


def _what(recipe: Recipe, result: Mapping[str, Any]) -> str:
    channels, height, width = result["map"]
    size = result["image_size"]
    return (
        f"## What it is\n\nAn image encoder, without a classifier: {_network(recipe)}. Images of {size} x {size} pixels give a map of {channels} x "
        f"{height} x {width}; its mean over places is the image's {channels} features.\n\n{_settings(recipe.encoder.model_dump(mode='json'))}"
    )


def _settings(values: Mapping[str, Any]) -> str:
    return _table(("setting", "value"), [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in values.items()])


def _table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    body = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
        for line in (heads, ["---"] * len(heads), *lines)
    ]
    return "\n".join(body)


def _how(recipe: Recipe, instance: StageInstance, made: Mapping[str, Any]) -> str:
    """Method, its deviations, and the budget: of the stage of this recipe that made it, where it was one."""
    if made.get("method", {}).get("name") not in METHODS:
        return "## How it was learned\n\nUnknown: the encoder does not say."
    spec = made["method"]
    method = METHODS[spec["name"]]
    said = "\n".join(f"- {line}" for line in method.deviations)
    parts = [
        f"## How it was learned\n\n{method.title} ({method.paper}), with seed {made.get('seed', 'unknown')}.",
        _settings({key: value for key, value in spec.items() if key != "name"}),
        f"Known differences from the paper, and what the paper does not give:\n\n{said}",
        _budget(_trained_by(recipe, instance)),
    ]
    return "\n\n".join(parts)


def _trained_by(recipe: Recipe, instance: StageInstance) -> Pretrain | None:
    """The pretraining stage of this recipe that made the encoder; None: it came by a reference."""
    source = recipe.encoder_source(instance.stage)
    stage = recipe.stages[source.stage] if source is not None and source.stage is not None else None
    return stage if isinstance(stage, Pretrain) else None


def _budget(stage: Pretrain | None) -> str:
    if stage is None:
        return "Its budget stands in the MLflow run that made it."
    values = stage.model_dump(
        mode="json",
        include={
            "epochs",
            "batch_size",
            "optimizer",
            "schedule",
            "precision",
            "labelled_per_batch",
            "labels_per_class",
        },
    )
    labels = (
        "No label was seen."
        if stage.labelled_per_batch == 0
        else "Labels were seen: see labelled_per_batch and labels_per_class."
    )
    return f"The budget. {labels}\n\n{_settings(values)}"


def _data(store: Store, worker: StageContext, made: Mapping[str, Any]) -> str:
    splits = worker.splits
    lines = [
        (
            "data set",
            f"`{worker.recipe.dataset.name}` (source: {store.source.get('kind', worker.recipe.dataset.source)})",
        ),
        (
            "images",
            f"{len(splits.train):,} to train on, {len(splits.val):,} held out of these, {len(splits.test):,} to test on",
        ),
        ("classes", len(store.classes) or "none: no labels"),
        ("quarantined", f"{store.quarantined:,} images that cannot be decoded"),
        ("sha256 of the store", f"`{store.hash}`"),
    ]
    other = made.get("store") not in (None, store.hash)
    note = (
        f"\n\nThe encoder was learned from another store, `{made['store']}`; the one above is that of the numbers below."
        if other
        else ""
    )
    return f"## Data\n\n{_table(('what', 'value'), lines)}{note}"


def _worth(recipe: Recipe, instance: StageInstance, siblings: Sequence[StageInstance]) -> str:
    """Test accuracies of this encoder, beside the baseline, and of all seeds."""
    found = score_rows(recipe, siblings)
    if not found:
        return "## What it was worth\n\nNot measured in this recipe."
    seeds = {row.stage: [i.seed for i in siblings if i.stage == row.stage] for row in found}
    lines = []
    for row in found:
        mine = seeds[row.stage].index(instance.seed)
        lines.append((row.stage, row.measure, f"{100 * row.pretrained[mine]:.2f}", f"{100 * row.baseline[mine]:.2f} ({row.against})",
                      f"{row.gain.mean():+.2f} over {len(row.gain)}: {row.verdict}"))  # fmt: skip
    heads = ("stage", "measure", "this encoder", "without pretraining", "mean gain, seeds")
    return f"## What it was worth\n\nAccuracy on test images (%), one seed, and the gain over all seeds of the recipe.\n\n{_table(heads, lines)}"


def _loading(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """For each format how to load it, in the folder of this card, and how far it is from the encoder."""
    input_ = _normalisation(recipe.encoder.model_dump(mode="json"))
    size = result["image_size"]
    parts = [
        "## How to load it",
        f"Images are RGB, floats in 0..1, cropped to {size} x {size} as `dataset.eval_augment` of the recipe does: "
        f"`{json.dumps([op.model_dump(mode='json') for op in recipe.dataset.eval_augment])}`. Run in the folder of this card.",
    ]
    for format, facts in result["formats"].items():
        worst = max(facts["difference"].values(), key=lambda found: found["relative"])
        said = f"Largest difference from the encoder: {worst['absolute']:.2g}, {worst['relative']:.2g} of its largest value."
        parts.append(
            f"### {NAMES[format]}\n\n{said}{_remark(format, facts)}\n\n```python\n{_code(format, facts, size, input_)}\n```"
        )
        parts.append(
            _table(
                ("file", "bytes", "sha256"),
                [(f"`{format}/{n}`", f["bytes"], f"`{f['sha256']}`") for n, f in facts["files"].items()],
            )
        )
    parts += [f"Not as {NAMES[format]}: {reason}." for format, reason in result["left_out"].items()]
    return "\n\n".join(parts)


def _normalisation(spec: Mapping[str, Any]) -> str:
    """The lines that a state dict's user must run; graphs hold them."""
    shared = SharedEncoderOptions()
    if spec.get("normalize", shared.normalize) == "image":
        return (
            "x = (images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True).clamp_min(1e-5)"
        )
    mean, std = (tuple(spec.get(key, getattr(shared, key))) for key in ("mean", "std"))
    return f"mean, std = (torch.tensor(v).view(3, 1, 1) for v in ({mean}, {std}))\nx = (images - mean) / std"


def _remark(format: str, facts: Mapping[str, Any]) -> str:
    if format in ("torchvision", "timm"):
        missing = facts["missing"]
        named = ", ".join(f"`{name}`" for name in missing[:4]) + (
            f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        )
        return (
            f" Compared with {NAMES[format]} {facts['version']}. "
            + (f"The network's head is not in the file: {named}. " if missing else "")
            + "The normalisation is not part of the state dict: it stands in the lines below."
        )
    if format == "onnx":
        return f" Opset {facts['opset']}; compared by onnxruntime {facts['version']}. The normalisation is in the graph; any number of images at once."
    if format == "torch_export":
        return (
            f" Written by torch {facts['version']}, and compared before it was written. The normalisation is in the graph; any number of images at "
            "once. torch.export.load may unpickle parts of a file: check its sha256."
        )
    return " Spec and weights, with a manifest of sha256 sums; the normalisation is part of the encoder."


def _code(format: str, facts: Mapping[str, Any], size: int, input_: str) -> str:
    """Python that ends with `features`, (B, C), and where there is one, `map`."""
    images = f"images = torch.rand(2, 3, {size}, {size})"
    if format in ("torchvision", "timm"):
        return "\n".join([*_library(format, facts), images, input_, *_asked(format, facts)])
    if format == "safetensors":
        lines = [
            "from pathlib import Path",
            "import torch",
            "from firstlight.pipeline.stages.artifacts import load_encoder",
            "",
        ]
        call = [
            f'encoder = load_encoder(Path("safetensors"), {size}).eval()',
            images,
            "features = encoder(images)[-1].mean((2, 3))",
        ]
        return "\n".join([*lines, *call])
    if format == "onnx":
        lines = [
            "import numpy",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("onnx/encoder.onnx")',
        ]
        call = [
            f'images = numpy.random.rand(2, 3, {size}, {size}).astype("float32")',
            'features, map = session.run(["features", "map"], {"images": images})',
        ]
        return "\n".join([*lines, *call])
    return "\n".join(
        [
            "import torch",
            "",
            'encoder = torch.export.load("torch_export/encoder.pt2").module()',
            images,
            "features, map = encoder(images)",
        ]
    )


def _library(format: str, facts: Mapping[str, Any]) -> list[str]:
    build = (
        f'torchvision.models.get_model("{facts["model"]}")'
        if format == "torchvision"
        else f'timm.create_model("{facts["model"]}")'
    )
    load = f'net.load_state_dict(load_file("{format}/model.safetensors"), strict=False)'
    imports = [f"import {format}", "import torch", "from safetensors.torch import load_file"]
    imports += ["from torchvision.models.feature_extraction import create_feature_extractor"] * (
        format == "torchvision"
    )
    return [*imports, "", f"net = {build}.eval()", load]


def _asked(format: str, facts: Mapping[str, Any]) -> list[str]:
    if format == "torchvision":
        turn = ".permute(0, 3, 1, 2)" if facts["turned"] else ""
        ask = f'trunk = create_feature_extractor(net, {{"{facts["place"]}": "map"}})'
        return [ask, f'map = trunk(x)["map"]{turn}', "features = map.mean((2, 3))"]
    if facts["place"] == "forward_features":
        return ["map = net.forward_features(x)", "features = map.mean((2, 3))"]
    return [
        'map = net.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)[-1]',
        "features = map.mean((2, 3))",
    ]
