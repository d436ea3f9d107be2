"""The one error of decoding, and Pillow kept quiet and within limits, so that nothing else comes out of it."""

import ctypes
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image, ImageFile

from firstlight.pipeline.errors import one_line

MAX_REASON_LENGTH = 200
# The kinds of defects of an image, as the notes about a data set count them.
BadImageKind = Literal[
    "unreadable", "truncated", "too large", "needs an extra", "levels", "channels", "annotation", "not read"
]
DecodedT = TypeVar("DecodedT")
# Pillow's limits and Python's warning filters are global to the process.
_pillow_lock = threading.RLock()


class BadImage(ValueError):
    """The bytes are not a usable image; the text is a short reason of one line."""

    def __init__(self, reason: str, kind: BadImageKind = "unreadable") -> None:
        super().__init__(reason)
        self.kind: BadImageKind = kind


def _silence_pillow() -> None:
    """Silences Pillow and its libtiff about broken files: their messages name no file; `BadImage` has the reason."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    # The messages remain on other systems than Linux, or if Pillow does not bring a libtiff.
    with suppress(OSError, AttributeError):
        mapped = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
        libtiff = next(iter({line[line.index("/") :] for line in mapped if "/libtiff" in line}), "")
        ctypes.CDLL(libtiff).TIFFSetErrorHandler(None)


_silence_pillow()


def raise_only_bad_image(read: Callable[[], DecodedT], max_pixels: int) -> DecodedT:
    """Returns `read()`, called with Pillow within `max_pixels`; raises BadImage for whatever it raises."""
    try:
        with _limit_pillow(max_pixels):
            return read()
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"is larger than {describe_pixel_limit(max_pixels)}", "too large") from None
    except Exception as error:
        # Pillow's plugins raise any exception that their parsing of hostile bytes runs into.
        reason = describe_decoding_error(error)
        raise BadImage(reason, "truncated" if "truncated" in reason else "unreadable") from None


def describe_pixel_limit(max_pixels: int) -> str:
    return f"{max_pixels} pixels (dataset.max_pixels)"


@contextmanager
def _limit_pillow(max_pixels: int) -> Iterator[None]:
    """Sets our pixel limit, silence, and no padding of truncated files in Pillow; restores its settings afterwards."""
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        # Pillow refuses images from twice its limit on, and some plugins allocate while opening: the limit must hold
        # there already.
        Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def describe_decoding_error(error: Exception) -> str:
    """Returns the text of an exception on one line, without memory addresses, or its type if it has no text."""
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the file", one_line(error, limit=None))
    return (text or type(error).__name__)[:MAX_REASON_LENGTH]
