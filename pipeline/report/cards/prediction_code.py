"""Python code in the card of a fine-tuned model that predicts with an exported format.

The code for ONNX needs Pillow, numpy and onnxruntime alone: it prepares images as the stage that made the model did.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS
from firstlight.pipeline.report.cards.loading_code import TIMM_FOLDER_CODE, format_arguments
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing
from firstlight.tasks.nn.timm_folder import TIMM_CONFIG_FILE

# The share of the shorter side that a crop takes by default, and the position of a crop: 0 is the left or top edge.
DEFAULT_SCALES = {"center_crop": 1.0, "corner_crop": 0.875}
CROP_POSITIONS = {"center": (0.5, 0.5), "top_left": (0.0, 0.0), "top_right": (1.0, 0.0)}
CROP_POSITIONS |= {"bottom_left": (0.0, 1.0), "bottom_right": (1.0, 1.0)}
CROP_CODE = """
def crop_square(image, x, y, scale, side=None):
    shorter = min(image.size)
    side = min(side, shorter) if side else scale * shorter
    free = [length - side for length in image.size]
    if side == size or not isinstance(side, float):  # on whole pixels
        left, top = (min(int(place * (rest + 1)), rest) for place, rest in zip((x, y), free))
    else:
        left, top = x * free[0], y * free[1]
    box = (max(left, 0), max(top, 0), min(left + side, image.width), min(top + side, image.height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
"""
FIT_CODE = """
def fit_square(image):
    sides = [max(1, round(length * (size / max(image.size)))) for length in image.size]
    view = Image.new("RGB", (size, size))
    view.paste(image.resize(sides, Image.Resampling.BILINEAR), tuple((size - side) // 2 for side in sides))
    return view
"""
# Ends with `probabilities` (B, classes).
PROBABILITY_CODE = {
    "classify": "weights = numpy.exp(logits - logits.max(1, keepdims=True))\n"
    "probabilities = weights / weights.sum(1, keepdims=True)",
    "classify_square": "weights = numpy.maximum(logits, 0)\nprobabilities = weights / weights.sum(1, keepdims=True)",
    "multilabel": "probabilities = 1 / (1 + numpy.exp(-logits))",
}


def describe_view_code(views: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[str, list[str]] | None:
    """Returns functions that make views with Pillow, and an expression for each view of `image`.

    Returns None if an augmentation is not a fixed crop or a mirror image.
    """
    functions, expressions = list[str](), list[str]()
    for first, *others in views:
        op = first["op"]
        if any(other["op"] != "horizontal_flip" or other.get("p") != 1.0 for other in others):
            return None
        if op == "fit":
            functions.append(FIT_CODE)
            expression = "fit_square(image)"
        elif op in DEFAULT_SCALES:
            functions.append(CROP_CODE)
            x, y = CROP_POSITIONS[first.get("corner", "center")]
            scale = float(first.get("scale") or DEFAULT_SCALES[op])
            side = f", {first['size']}" if first.get("size") else ""
            expression = f"crop_square(image, {x}, {y}, {scale}{side})"
        else:
            return None
        expressions.append(expression + ".transpose(Image.Transpose.FLIP_LEFT_RIGHT)" * len(others))
    return "".join(dict.fromkeys(functions)), expressions


def onnx_prediction_code(task: str, preprocessing: Preprocessing) -> str:
    """Returns Python that predicts the classes of `image.jpg` with Pillow, numpy and onnxruntime alone."""
    pixels = preprocessing.pixels
    code = None if preprocessing.windows or pixels else describe_view_code(preprocessing.views)
    lines = [
        "import json",
        "import numpy",
        "import onnxruntime",
        *(["from PIL import Image, ImageOps"] if code else []),
        "",
        'session = onnxruntime.InferenceSession("onnx/model.onnx")',
        "facts = session.get_modelmeta().custom_metadata_map",
        'classes, size = json.loads(facts["classes"]), int(facts["image_size"])',
    ]
    if code is None:
        ops = json.dumps(preprocessing.windows or preprocessing.views)
        lines += [f"# Make views of size x size pixels of the image by: {ops}"]
        count = (pixels or RGB_PIXELS).channels
        lines += [f"# An image is an array (H, W, {count}) of {pixels.dtype}: / {pixels.white}"] if pixels else []
        lines += [f'images = numpy.random.rand(2, {count}, size, size).astype("float32")']
    else:
        functions, views = code
        lines += [functions, 'image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")']
        lines += [f"views = [{', '.join(views)}]"]
        lines += [
            "images = numpy.stack([numpy.asarray(view, numpy.float32).transpose(2, 0, 1) / 255 for view in views])"
        ]
    lines += ['(logits,) = session.run(["logits"], {"images": images})']
    return "\n".join([*lines, *_answer_code(task)])


def _answer_code(task: str) -> list[str]:
    if task not in PROBABILITY_CODE:
        return [
            "mask = logits.argmax(1)  # (views, size, size), indices of `classes`",
            "for k in numpy.unique(mask):",
            '    print(f"{classes[k]}: {(mask == k).mean():.1%} of the pixels")',
        ]
    return [
        "logits = logits.mean(0, keepdims=True)  # over the views of the image",
        PROBABILITY_CODE[task],
        "for k in probabilities[0].argsort()[::-1][:5]:",
        '    print(f"{classes[k]}: {probabilities[0, k]:.1%}")',
    ]


def model_prediction_code(format: str, facts: Mapping[str, Any], task: str, seen: Preprocessing, norm: str) -> str:
    """Returns Python that predicts with an exported format of a fine-tuned model.

    `norm`: lines that normalise `images` to `x`, for state dicts of libraries.
    """
    if format == "onnx":
        return onnx_prediction_code(task, seen)
    if format == "safetensors":
        return "\n".join(
            ["import firstlight as fl", "", 'model = fl.load_model("safetensors")', *_firstlight_code(task)]
        )
    images = f"images = torch.rand(2, {(seen.pixels or RGB_PIXELS).channels}, {seen.image_size}, {seen.image_size})"
    if format == "torch_export":
        lines = ["import torch", "", 'model = torch.export.load("torch_export/model.pt2").module()']
        return "\n".join([*lines, images, "logits = model(images)"])
    lines = [f"import {format}", "import torch", "from safetensors.torch import load_file", ""]
    if format == "timm" and TIMM_CONFIG_FILE in facts.get("files", {}):
        lines = ["import timm", "import torch", "", f"net = {TIMM_FOLDER_CODE}", images, norm]
        lines += ["with torch.inference_mode():", "    logits = net(x)"]
        return "\n".join([*lines, 'classes = net.pretrained_cfg["label_names"]  # in the order of the logits'])
    if format == "timm":
        lines += [f"net = timm.create_model({format_arguments(facts, num_classes=facts['classes'])}).eval()"]
    else:
        lines += [f'net = torchvision.models.get_model("{facts["model"]}").eval()']
        lines += [f'head = net.get_submodule("{facts["head"]}")']
        lines += [f'net.set_submodule("{facts["head"]}", torch.nn.Linear(head.in_features, {facts["classes"]}))']
    lines += [f'net.load_state_dict(load_file("{format}/model.safetensors"))', images, norm]
    return "\n".join([*lines, "with torch.inference_mode():", "    logits = net(x)"])


def _firstlight_code(task: str) -> list[str]:
    lines = ['(answer,) = model.predict(["image.jpg"])']
    if task == "detect":
        return [*lines, "for box, score, label in zip(answer.boxes, answer.scores, answer.labels):",
                "    print(model.classes[label], score, box)"]  # fmt: skip
    return [*lines, "print(answer.rank_classes(5))"]
