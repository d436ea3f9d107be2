"""Sources of weights: files, folders, and tags of timm, torchvision and the Hugging Face hub -> one local file.

Libraries download and cache as they always do. Their own readers are not used: every file passes `checkpoint_files`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.tasks.nn.export_formats import TENSOR_PREFIXES
from firstlight.tasks.nn.weights.checkpoint_files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from firstlight.tasks.nn.weights.hub_access import find_cached_file, find_unknown_host

# Files of weights in a folder, by preference: an encoder's of this project, then those of hubs.
FOLDER_FILES = ("encoder.safetensors", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
# Folders of an export that hold weights.
EXPORT_FOLDERS = ("safetensors", "timm", "torchvision")
MAX_CONFIG_BYTES = 10_000_000
# The owner and the name of a model on the Hugging Face hub.
HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The mean and deviation of the red, green and blue values of ImageNet's images, in 0..1. The package that has them
# takes seconds to import.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALID_SOURCES = (
    "a file or folder, timm, timm:TAG, torchvision, torchvision:WEIGHTS.TAG, hf-hub:OWNER/NAME, local-dir:FOLDER"
)


@dataclass(frozen=True)
class WeightSource:
    """A local file of weights, and what is known of them besides."""

    # The source as it was asked for.
    source: str
    path: Path
    # The licence as the library states it.
    licence: str | None = None
    # The input that the weights were trained with: mean and standard deviation of images in 0..1, the side in pixels.
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    image_size: int | None = None


def find_weights(source: str, spec: Mapping[str, Any]) -> WeightSource:
    """Returns the local file of the weights that `source` names; a library downloads it if it must.

    Args:
        source: a file, a folder (of an export, or as hubs serve them; also as `local-dir:FOLDER`), `timm` or `timm:TAG`
            (`a1_in1k` or `resnet18.a1_in1k`), `torchvision` or `torchvision:ResNet18_Weights.IMAGENET1K_V1`,
            `hf-hub:OWNER/NAME`, with `@REVISION` if wanted.
        spec: the spec of the encoder that the weights are for.

    Raises:
        ValueError: there are no such weights, or they cannot be downloaded; in one line.
    """
    kind, _, rest = source.partition(":")
    if kind == "timm":
        return _find_timm_weights(source, rest, spec)
    if kind == "torchvision":
        return _find_torchvision_weights(source, rest, spec)
    if kind == "hf-hub":
        return _find_hub_weights(source, rest)
    path = Path(rest if kind == "local-dir" else source).expanduser()
    if path.is_dir():
        return _find_folder_weights(source, path)
    if not path.is_file() or kind == "local-dir":
        raise ValueError(f"{source!r} does not exist; valid: {VALID_SOURCES}")
    return WeightSource(source, path)


def name_weights(source: str, spec: Mapping[str, Any]) -> str:
    """Returns a source as anybody knows it: a tag of a library in full, a repository, or the name of a file or folder.

    The path of a file is that of one machine. A tag that the library does not know stays as it is.
    """
    kind, _, rest = source.partition(":")
    if kind in ("timm", "torchvision"):
        try:
            return f"{kind}:{_name_tag(kind, rest, _name_library_model(source, kind, spec))}"
        except (ValueError, KeyError, AttributeError):
            return source
    if kind in ("hf-hub", "runs", "models"):
        return source
    return Path(rest if kind == "local-dir" else source).expanduser().resolve().name


def _name_tag(library: str, tag: str, model: str) -> str:
    """Returns the full name of a library's weights. `tag`: "" for those that it loads by default."""
    if library == "torchvision":
        from torchvision.models import get_model_weights

        return tag or str(get_model_weights(model)["DEFAULT"])
    if "." in tag:
        return tag
    import timm

    config = None if tag else timm.get_pretrained_cfg(model)
    return f"{model}.{tag or (config.tag if config else '')}".rstrip(".")


def find_hub_model(source: str) -> str | None:
    """Returns `OWNER/NAME`, the model of the Hugging Face hub that holds the weights of a source; None if it is not
    known.

    `source`: as `name_weights` returns it.
    """
    kind, _, rest = source.partition(":")
    found: Any = rest.partition("@")[0] if kind == "hf-hub" else None
    if kind == "timm":
        import timm

        try:
            config = timm.get_pretrained_cfg(rest)
        # Names and tags of other versions of timm.
        except (RuntimeError, ValueError):
            config = None
        found = config.hf_hub_id if config else None
    return found if isinstance(found, str) and HUB_MODEL.fullmatch(found) else None


def _find_timm_weights(source: str, tag: str, spec: Mapping[str, Any]) -> WeightSource:
    import timm

    model = _name_library_model(source, "timm", spec)
    name, _, own_tag = tag.partition(".") if "." in tag else (model, ".", tag)
    if name != model:
        raise ValueError(f"{source!r} has weights of {name!r}, and the encoder is {model!r}")
    tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{model}.*")]
    if own_tag and own_tag not in tags:
        raise ValueError(f"{source!r} is unknown to timm; valid: {_list_choices('timm:', tags)}")
    config = timm.get_pretrained_cfg(f"{model}.{own_tag}" if own_tag else model)
    facts = _read_pretrained_config(config.to_dict() if config else {})
    if config is None or not config.has_weights:
        raise ValueError(f"{source!r}: timm has no weights for {model!r}")
    if config.custom_load:
        raise ValueError(f"{source!r}: these weights are not stored as a state dict; {_list_choices('timm:', tags)}")
    if config.hf_hub_id:
        files = (config.hf_hub_filename,) if config.hf_hub_filename else FOLDER_FILES[1:3]
        return WeightSource(source, _download_hub_file(source, config.hf_hub_id, files), **facts)
    return WeightSource(source, _download_url(source, config.url), **facts)


def _find_torchvision_weights(source: str, tag: str, spec: Mapping[str, Any]) -> WeightSource:
    from torchvision.models import get_model_weights, get_weight

    model = _name_library_model(source, "torchvision", spec)
    valid = get_model_weights(model)
    try:
        weights: Any = get_weight(tag) if tag else valid["DEFAULT"]
    except (ValueError, KeyError, AttributeError):
        weights = None
    if weights not in list(valid):
        raise ValueError(
            f"{source!r} has no weights of {model!r}; valid: {_list_choices('torchvision:', map(str, valid))}"
        )
    transforms = weights.transforms()
    facts = {
        "mean": _parse_statistics(getattr(transforms, "mean", None)),
        "std": _parse_statistics(getattr(transforms, "std", None), positive=True),
        "interpolation": getattr(getattr(transforms, "interpolation", None), "value", None),
        "image_size": next(iter(getattr(transforms, "crop_size", ())), None),
        "licence": weights.meta.get("license"),
    }
    return WeightSource(source, _download_url(source, weights.url), **facts)


def _find_hub_weights(source: str, repository: str) -> WeightSource:
    config = _download_hub_file(source, repository, ("config.json",))
    facts = _read_folder_facts(config.parent)
    return WeightSource(source, _download_hub_file(source, repository, FOLDER_FILES[1:]), **facts)


def _find_folder_weights(source: str, folder: Path) -> WeightSource:
    places = [folder, *(folder / name for name in EXPORT_FOLDERS)]
    for place in places:
        for name in FOLDER_FILES:
            if (place / name).is_file():
                return WeightSource(source, place / name, **_read_folder_facts(place))
    suffixes = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
    single = [file for file in sorted(folder.iterdir()) if file.name.endswith(suffixes) and file.is_file()]
    if len(single) == 1:
        return WeightSource(source, single[0], **_read_folder_facts(folder))
    raise ValueError(
        f"{source!r} has {len(single)} files of weights, and none of {', '.join(FOLDER_FILES)}; valid: the file itself"
    )


def _name_library_model(source: str, library: str, spec: Mapping[str, Any]) -> str:
    """Returns the name in `library` of the network of a spec."""
    if spec["name"] == library:
        return str(spec["model"])
    if spec["name"] in TENSOR_PREFIXES:
        return TENSOR_PREFIXES[spec["name"]][0]
    other = f" ({spec['model']!r})" if "model" in spec else ""
    raise ValueError(f"{source!r}: {library} has no network like encoder.name: {spec['name']}{other}")


def _download_hub_file(source: str, repository: str, names: tuple[str, ...]) -> Path:
    """Downloads the first of `names` that a repository of the hub has.

    Raises:
        ValueError: there is none, or the hub cannot be reached.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    unknown = None if constants.HF_HUB_OFFLINE else find_unknown_host(constants.ENDPOINT)
    if unknown is not None:
        if (cached := find_cached_file(name, names, revision or None)) is not None:
            return cached
        raise _explain_failed_download(source, OSError(f"this machine cannot find {unknown}"))
    missing: Exception | None = None
    for file in names:
        try:
            return Path(hf_hub_download(name, file, revision=revision or None))
        except LocalEntryNotFoundError as error:
            raise _explain_failed_download(source, error) from None
        except EntryNotFoundError as error:
            missing = error
        # The hub's client passes on the errors of its own libraries.
        except Exception as error:
            raise _explain_failed_download(source, error) from None
    raise ValueError(f"{source!r}: {name} has none of {', '.join(names)}") from missing


def _download_url(source: str, url: Any) -> Path:
    from timm.models import _hub

    try:
        return Path(_hub.download_cached_file(url, check_hash=True))
    # A server, a proxy, a full disk, another hash.
    except Exception as error:
        raise _explain_failed_download(source, error) from None


def _explain_failed_download(source: str, error: Exception) -> ValueError:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ValueError(f"{source!r} cannot be downloaded: {line[:200]}; valid offline: a file or folder")


def _read_folder_facts(folder: Path) -> dict[str, Any]:
    """Returns what the descriptions in a folder say of the input and the licence of its weights."""
    readers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "encoder.json": _read_encoder_description,
        "config.json": lambda config: _read_pretrained_config(config.get("pretrained_cfg", config)),
        "preprocessor_config.json": _read_preprocessor_config,
    }
    facts: dict[str, Any] = {}
    for name, read in readers.items():
        content = _read_json(folder / name)
        found = read(content) if content else {}
        facts |= {key: value for key, value in found.items() if value is not None and facts.get(key) is None}
    return facts


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
            return None
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_encoder_description(content: Mapping[str, Any]) -> dict[str, Any]:
    spec = content.get("spec")
    if not isinstance(spec, dict) or spec.get("normalize", "dataset") != "dataset":
        return {}
    size, origin = content.get("image_size"), content.get("weights")
    licence = origin.get("licence") if isinstance(origin, dict) else None
    return {
        "licence": licence if isinstance(licence, str) else None,
        "mean": _parse_statistics(spec.get("mean")),
        "std": _parse_statistics(spec.get("std"), positive=True),
        "image_size": size if isinstance(size, int) else None,
    }


def _read_pretrained_config(config: Any) -> dict[str, Any]:
    """Returns the facts of a `pretrained_cfg` of timm."""
    if not isinstance(config, Mapping):
        return {}
    size = config.get("input_size")
    text = {key: value for key in ("license", "interpolation") if isinstance(value := config.get(key), str)}
    return {
        "licence": text.get("license"),
        "interpolation": text.get("interpolation"),
        "mean": _parse_statistics(config.get("mean")),
        "std": _parse_statistics(config.get("std"), positive=True),
        "image_size": size[-1] if isinstance(size, list | tuple) and size and isinstance(size[-1], int) else None,
    }


def _read_preprocessor_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts of a `preprocessor_config.json` of the library transformers."""
    return {
        "mean": _parse_statistics(config.get("image_mean")),
        "std": _parse_statistics(config.get("image_std"), positive=True),
    }


def _parse_statistics(value: Any, positive: bool = False) -> tuple[float, float, float] | None:
    """Returns three finite numbers as a colour; None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
        return None
    if any(number < 0 or (positive and number == 0) for number in value):
        return None
    return (float(value[0]), float(value[1]), float(value[2]))


def _list_choices(prefix: str, names: Any) -> str:
    found = sorted(names)
    shown = ", ".join(f"{prefix}{name}" for name in found[:8])
    return f"{shown} and {len(found) - 8} more" if len(found) > 8 else shown or "none"


def find_default_colours(spec: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Returns the mean and standard deviation that weights of a network usually expect, and words for what has them.

    A network of timm has the values of timm's own weights, and a network that torchvision has those of ImageNet. The
    result is None for the others.
    """
    if spec["name"] == "timm":
        import timm

        config = timm.get_pretrained_cfg(spec["model"])
        return None if config is None else (tuple(config.mean), tuple(config.std), f"timm's {spec['model']}")
    if spec["name"] == "torchvision" or spec["name"] in TENSOR_PREFIXES:
        name = spec.get("model", spec["name"])
        return IMAGENET_MEAN, IMAGENET_STD, f"weights of {name} from ImageNet"
    return None
