"""The description of a saved encoder, `encoder.json`: its spec, and the facts of how it was made."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.records import Count, RecordShape, parse_record
from firstlight.pipeline.train.folder_manifest import DamagedFileError, read_verified

# The fact of an encoder that no image of the store was kept apart from its training.
TRAINED_ON_ALL_KEY = "trained_on_all"
# The fact of an encoder that names the settings by which a fine-tuning has taken layers out of it.
LOST_LAYERS_KEY = "lost_layers"
# The fact of an encoder that describes the existing weights that it comes from, however much it was trained since:
# `source`, `sha256`, `part`, `layout` and `licence`, as far as they are known.
WEIGHTS_ORIGIN_KEY = "weights"


class _EncoderShape(RecordShape):
    """The content of `encoder.json`."""

    spec: dict[str, Any]
    image_size: Annotated[int, Field(ge=1, le=2**11)]
    shapes: list[list[Count]]
    lost_layers: list[str] = Field([])


ENCODER_SHAPE = TypeAdapter(_EncoderShape)


def read_encoder_spec(folder: Path) -> dict[str, Any]:
    """Returns the spec of a saved encoder, after its files were checked.

    Raises:
        UserError: a file is missing, damaged, or not an encoder's; the message names it.
    """
    spec: dict[str, Any] = read_encoder_description(folder)["spec"]
    return spec


def read_encoder_description(folder: Path) -> dict[str, Any]:
    """Returns what was saved of an encoder besides its weights: `spec`, `image_size`, and how it was made.

    Raises:
        UserError: as `read_encoder_spec`.
    """
    try:
        _, files = read_verified(folder)
        return parse_record(files["encoder.json"], ENCODER_SHAPE, "encoder.json")
    except (DamagedFileError, KeyError, ValueError) as error:
        raise UserError(f"{folder}: is not a whole encoder: {one_line(error)}") from None


def check_whole_encoder(folder: Path, where: str | None = None) -> None:
    """Checks that a saved encoder has all layers of its spec: a fine-tuning may have taken some out of it.

    Raises:
        UserError: as `read_encoder_spec`; or it has not: the message begins with `where`, by default the folder.
    """
    lost = read_encoder_description(folder).get(LOST_LAYERS_KEY)
    if lost:
        raise UserError(
            f"{where or folder}: this encoder has lost layers in its fine-tuning ({', '.join(lost)}), and nothing else "
            "can start from it; valid: predictions of the whole model, or another encoder"
        )


def was_trained_on_all(folder: Path, store: str) -> bool:
    """Returns True if a saved encoder was trained on every image of the store with the hash `store`.

    Raises:
        UserError: as `read_encoder_spec`.
    """
    description = read_encoder_description(folder)
    return bool(description.get(TRAINED_ON_ALL_KEY)) and description.get("store") == store


def check_encoder_spec(folder: Path, spec: dict[str, Any], where: str) -> None:
    """Checks that a saved encoder has the spec of the recipe's encoder. Where that one has null, any value fits.

    Raises:
        UserError: the message names the first key that differs, with both values.
    """
    saved = json.loads(json.dumps(read_encoder_spec(folder)))
    wanted = json.loads(json.dumps(spec))
    wanted |= {key: saved[key] for key in ("mean", "std") if key in saved and wanted.get(key, 0) is None}
    # It changes how a gradient is computed, not the network.
    for one in (saved, wanted):
        one.pop("grad_checkpointing", None)
    for key in sorted(
        saved.keys() | wanted.keys(), key=lambda key: (key != "name", key)
    ):  # of another network all else differs too
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"encoder.{key}: {wanted.get(key)!r} differs from {saved.get(key)!r} of the encoder that {where} "
                f"names ({folder})"
            )
