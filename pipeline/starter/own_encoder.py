"""Encoders of Firstlight on disk that a first run may start from: their network and image size are known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS
from firstlight.pipeline.stages.artifacts.encoder_description import read_encoder_description

# The file that describes an encoder in its folder.
DESCRIPTION_FILE = "encoder.json"


@dataclass(frozen=True)
class OwnEncoder:
    """A saved encoder: the section `encoder` that names it, and the side of its images."""

    section: dict[str, Any]
    image_size: int

    @property
    def channels(self) -> int:
        """The number of channels of its images."""
        return int(self.section.get("channels") or RGB_PIXELS.channels)


def find_own_encoder(text: str) -> OwnEncoder | None:
    """Returns the encoder of a folder: its own, or the first seed's of the last pretraining of a run in it.

    `text`: the folder of an encoder, or the `--out` of an earlier first run. None if it is neither.

    Raises:
        UserError: the encoder is damaged.
    """
    folder = _find_folder(Path(text))
    if folder is None:
        return None
    description = read_encoder_description(folder)
    return OwnEncoder({**description["spec"], "weights": str(folder.resolve())}, description["image_size"])


def _find_folder(folder: Path) -> Path | None:
    if (folder / DESCRIPTION_FILE).is_file():
        return folder
    found = folder.glob(f"*/*-seed*/encoder/{DESCRIPTION_FILE}")
    # The newest of all pretrainings there is taken, and the first of its seeds.
    newest = max(found, key=lambda file: file.stat().st_mtime_ns, default=None)
    if newest is None:
        return None
    stage, _ = _parse_instance(newest)
    seeds = {_parse_instance(file)[1]: file for file in newest.parents[2].glob(f"{stage}-seed*/encoder/{newest.name}")}
    return seeds[min(seeds)].parent


def _parse_instance(file: Path) -> tuple[str, int]:
    """Returns the stage and the seed of an encoder's file, by the name of the folder of its instance."""
    stage, _, rest = file.parents[1].name.rpartition("-seed")
    return stage, int(rest.partition("-")[0])
