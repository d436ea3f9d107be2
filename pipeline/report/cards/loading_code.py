"""Python code in a model card that loads an exported encoder and computes its features."""

from collections.abc import Mapping
from typing import Any

from firstlight.tasks.nn.export_formats import NORMED_SOURCE
from firstlight.tasks.nn.input_normalization import RGB_CHANNELS, SharedEncoderOptions
from firstlight.tasks.nn.timm_folder import TIMM_CONFIG_FILE

# The call by which timm loads the folder of its format by its name.
TIMM_FOLDER_CODE = 'timm.create_model("local-dir:timm", pretrained=True).eval()'


def loading_code(
    format: str, facts: Mapping[str, Any], size: int, normalisation: str, channels: int = RGB_CHANNELS
) -> str:
    """Returns Python that computes `features`, (B, C), and for most formats `map`, (B, C, h, w), of example images.

    `channels`: those of an image.
    """
    images = f"images = torch.rand(2, {channels}, {size}, {size})"
    if format in ("torchvision", "timm"):
        return "\n".join([*_library_code(format, facts), images, normalisation, *_map_code(format, facts)])
    if format == "safetensors":
        return "\n".join(
            [
                "import torch",
                "import firstlight as fl",
                "",
                'encoder = fl.load_encoder("safetensors")',
                images,
                "features = encoder(images)[-1].mean((2, 3))",
            ]
        )
    if format == "onnx":
        lines = [
            "import numpy",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("onnx/encoder.onnx")',
        ]
        call = [
            f'images = numpy.random.rand(2, {channels}, {size}, {size}).astype("float32")',
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


def normalisation_code(spec: Mapping[str, Any]) -> str:
    """Returns the lines that normalise images. State dicts need them; exported graphs contain the normalisation."""
    shared = SharedEncoderOptions()
    if spec.get("normalize", shared.normalize) == "image":
        return (
            "x = (images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True).clamp_min(1e-5)"
        )
    mean, std = (tuple(spec.get(key, getattr(shared, key))) for key in ("mean", "std"))
    count = len(mean)
    return f"mean, std = (torch.tensor(v).view({count}, 1, 1) for v in ({mean}, {std}))\nx = (images - mean) / std"


def format_arguments(facts: Mapping[str, Any], **more: Any) -> str:
    """Returns the arguments with which timm builds the network of an exported format, as Python."""
    options = {**facts.get("options", {}), **more}
    return ", ".join([f'"{facts["model"]}"', *(f"{key}={value!r}" for key, value in options.items())])


def _library_code(format: str, facts: Mapping[str, Any]) -> list[str]:
    if format == "timm" and TIMM_CONFIG_FILE in facts.get("files", {}):
        return ["import timm", "import torch", "", f"net = {TIMM_FOLDER_CODE}"]
    build = (
        f'torchvision.models.get_model("{facts["model"]}")'
        if format == "torchvision"
        else f"timm.create_model({format_arguments(facts)})"
    )
    load = f'net.load_state_dict(load_file("{format}/model.safetensors"), strict=False)'
    imports = [f"import {format}", "import torch", "from safetensors.torch import load_file"]
    imports += ["from torchvision.models.feature_extraction import create_feature_extractor"] * (
        format == "torchvision"
    )
    return [*imports, "", f"net = {build}.eval()", load]


def _map_code(format: str, facts: Mapping[str, Any]) -> list[str]:
    if format == "torchvision":
        permute = ".permute(0, 3, 1, 2)" if facts["turned"] else ""
        trunk = f'trunk = create_feature_extractor(net, {{"{facts["place"]}": "map"}})'
        return [trunk, f'map = trunk(x)["map"]{permute}', "features = map.mean((2, 3))"]
    if facts.get("gives_maps"):
        permute = ".permute(0, 3, 1, 2)" if facts["channels_last"] else ""
        return [f"map = net(x)[-1]{permute}", "features = map.mean((2, 3))"]
    if facts["place"] == "forward_features":
        return ["map = net.forward_features(x)", "features = map.mean((2, 3))"]
    normed = ", norm=True" if facts["place"] == NORMED_SOURCE else ""
    return [
        f'map = net.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True{normed})[-1]',
        "features = map.mean((2, 3))",
    ]
