"""A decoded image of any number of channels, with the attributes of Pillow's images that loading asks for."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

# EXIF orientation -> (transposed, then flipped top to bottom, then left to right) makes it upright.
UPRIGHT_MOVES = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class ChannelImage:
    """An upright image: `values` are (height, width, channels) uint8 or uint16, as the file has them.

    `info`: `mode` and `format` of the file, and its EXIF `orientation` if it was not upright.
    """

    values: np.ndarray
    info: dict[Any, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return int(self.values.shape[1])

    @property
    def height(self) -> int:
        return int(self.values.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


def turn_values_upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns (H, W, C) values of an EXIF orientation upright; those of no orientation stay."""
    transposed, flipped, mirrored = UPRIGHT_MOVES.get(orientation, (False, False, False))
    values = values.swapaxes(0, 1) if transposed else values
    values = values[::-1] if flipped else values
    return values[:, ::-1] if mirrored else values
