"""The images that a fine-tuned model is asked about: files, those of a store, or objects in memory.

They are decoded as `prepare` and trainings decode theirs.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.images import BadImage, convert_to_rgb, open_rgb
from firstlight.pipeline.data.images.levels import LevelRanges, check_not_dark
from firstlight.pipeline.data.loader import OpenedImage
from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.sources.conventions.folder_scan import scan_folder
from firstlight.pipeline.data.sources.conventions.image_signatures import IMAGE_SUFFIXES
from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError, describe_os_error, one_line
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing

# A path, or an image in memory.
ImageLike = str | Path | Image.Image | np.ndarray | Tensor
GLOB_CHARACTERS = "*?["


class ImageItems(Protocol):
    """Images by their position, 0 .. `len` - 1. An object of this kind pickles small."""

    def __len__(self) -> int: ...

    def find_ids(self, positions: Sequence[int]) -> np.ndarray:
        """Returns the (n,) int64 ids by which random augmentations are drawn."""
        ...

    def open_image(self, position: int, preprocessing: Preprocessing) -> OpenedImage:
        """Returns an upright image, RGB or with the channels of the preprocessing.

        Raises:
            BadImage: it cannot be read or decoded.
        """
        ...

    def name_images(self, positions: Sequence[int]) -> list[str]:
        """Returns what tables and errors call images. `positions` are ascending."""
        ...


@dataclass(frozen=True)
class FileImages:
    """Image files."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def find_ids(self, positions: Sequence[int]) -> np.ndarray:
        return np.asarray(positions, np.int64)

    def open_image(self, position: int, preprocessing: Preprocessing) -> OpenedImage:
        return open_image_file(self.paths[position], preprocessing)

    def name_images(self, positions: Sequence[int]) -> list[str]:
        return [self.paths[position] for position in positions]


@dataclass(frozen=True)
class StoreImages:
    """Images of a store by their ids."""

    store: Store
    ids: np.ndarray = field(compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def find_ids(self, positions: Sequence[int]) -> np.ndarray:
        found: np.ndarray = self.ids[np.asarray(positions, np.int64)]
        return found

    def open_image(self, position: int, preprocessing: Preprocessing) -> OpenedImage:
        (data,), _ = self.store.read(self.ids[position : position + 1])
        if preprocessing.pixels is not None:
            return open_channels(data, preprocessing.pixels, preprocessing.max_pixels)
        # The levels that the model has learned come first.
        return open_rgb(data, preprocessing.max_pixels, {**self.store.levels, **(preprocessing.levels or {})})

    def name_images(self, positions: Sequence[int]) -> list[str]:
        ids = self.find_ids(positions)
        return [path or f"id {k}" for path, k in zip(self.store.read_paths(ids), ids.tolist(), strict=True)]


@dataclass(frozen=True)
class GivenImages:
    """Paths and images in memory, in any mixture."""

    images: Sequence[ImageLike]

    def __len__(self) -> int:
        return len(self.images)

    def find_ids(self, positions: Sequence[int]) -> np.ndarray:
        return np.asarray(positions, np.int64)

    def open_image(self, position: int, preprocessing: Preprocessing) -> OpenedImage:
        image = self.images[position]
        if isinstance(image, str | Path):
            return open_image_file(image, preprocessing)
        try:
            if preprocessing.pixels is not None:
                return convert_given_channels(image, preprocessing.pixels)
            return _check_levels(convert_given_image(image, preprocessing.levels or {}), preprocessing.levels or {})
        except (TypeError, ValueError, OSError) as error:
            raise error if isinstance(error, BadImage) else BadImage(one_line(error, limit=None)) from None

    def name_images(self, positions: Sequence[int]) -> list[str]:
        named = ((position, self.images[position]) for position in positions)
        return [str(image) if isinstance(image, str | Path) else f"images[{position}]" for position, image in named]


def open_image_file(path: str | Path, preprocessing: Preprocessing) -> OpenedImage:
    """Returns the image in a file upright, as RGB or with the channels of the preprocessing.

    Raises:
        BadImage: it cannot be read or decoded; or it has more than 8 bits, and the model has learned no range for them
            in which it would not be nearly black.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {describe_os_error(error)}", "not read") from None
    except ValueError as error:
        raise BadImage(f"cannot be read: {error}", "not read") from None
    if preprocessing.pixels is not None:
        return open_channels(data, preprocessing.pixels, preprocessing.max_pixels)
    levels = preprocessing.levels or {}
    return _check_levels(open_rgb(data, preprocessing.max_pixels, levels), levels)


def _check_levels(image: Image.Image, known: LevelRanges) -> Image.Image:
    levels = image.info.get("levels")
    if levels is not None and levels[0] not in known:
        check_not_dark(*levels)
    return image


def convert_given_channels(image: Image.Image | np.ndarray | Tensor, pixels: PixelFormat) -> ChannelImage:
    """Returns an array (H, W, C), or (H, W) of one channel, as an image with its channels as they are.

    Raises:
        ValueError: it is none of this format.
    """
    valid = f"valid: a path, or an array (H, W, {pixels.channels}) of {pixels.dtype}"
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a {type(image).__name__}; {valid}")
    values = np.atleast_3d(image)
    if image.dtype != pixels.dtype or values.ndim != 3 or values.shape[2] != pixels.channels or not image.size:
        raise ValueError(f"an array {image.shape} of {image.dtype}; {valid}")
    return ChannelImage(values)


def convert_given_image(image: Image.Image | np.ndarray | Tensor, levels: LevelRanges) -> Image.Image:
    """Returns an image in memory as RGB.

    Args:
        image: a PIL image; (H, W, 3) or (H, W) uint8; or a tensor (C, H, W), C 1 or 3, uint8 or floats in 0..1, which
            are rounded to 8 bits.
        levels: the levels that are black and white in images of more than 8 bits.

    Raises:
        BadImage, TypeError, ValueError: it is no image.
    """
    if isinstance(image, Tensor):
        image = convert_tensor_pixels(image)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"a {type(image).__name__}; valid: a path, an image of PIL, an array or a tensor")
    return convert_to_rgb(image, levels)


def convert_tensor_pixels(image: Tensor) -> np.ndarray:
    """Returns (H, W, 3) or (H, W) uint8 of a tensor (C, H, W), uint8 or floats in 0..1.

    Raises:
        ValueError: it has another shape, or values outside of 0..1.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a tensor of shape {tuple(image.shape)}; valid: (3, H, W), (1, H, W)")
    if image.is_floating_point():
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("a tensor with values outside of 0..1")
        image = (255 * image).round()
    pixels: np.ndarray = image.detach().to("cpu").numpy().astype(np.uint8).transpose(1, 2, 0)
    return pixels if pixels.shape[2] == 3 else pixels[:, :, 0]


def find_images(paths: Sequence[str], split: str | None = None) -> FileImages | StoreImages:
    """Returns the images that a command line names: files, folders, patterns, or the folder of one store.

    The images of a folder are those that a source `folder` would read, by path. `split`: the only split of a store.

    Raises:
        UserError: a path names nothing, or a store is not alone; names PATHS and the path.
    """
    stores = [path for path in paths if _is_store(Path(path))]
    if stores:
        if len(paths) > 1:
            raise UserError(f"PATHS: {stores[0]!r} is a store; valid: one store, or images, folders and patterns")
        return _open_store_images(Path(stores[0]), split)
    if split is not None:
        raise UserError(f"--split: {split!r} is valid with a store only, and PATHS names none")
    found = [name for path in paths for name in _list_image_files(path)]
    # A file that two patterns name is asked about once.
    return FileImages(tuple(dict.fromkeys(found)))


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).is_file()


def _open_store_images(folder: Path, split: str | None) -> StoreImages:
    store = Store.open(folder)
    if split is not None and split not in store.splits:
        raise UserError(f"--split: {split!r} is not in {folder}; valid: {', '.join(store.splits)}")
    ids = store.ids(split) if split is not None else np.arange(sum(store.splits.values()))
    return StoreImages(store, ids)


def _list_image_files(path: str) -> list[str]:
    """Returns the files that one argument names.

    Raises:
        UserError: it names nothing, or a folder without images.
    """
    if os.path.isdir(path):
        return _list_folder_images(path)
    if os.path.lexists(path):
        return [path]
    if not any(character in path for character in GLOB_CHARACTERS):
        raise UserError(
            f"PATHS: {path!r} does not exist; valid: images, folders, patterns such as 'photos/*.jpg', or a store"
        )
    matched = sorted(glob.glob(path, recursive=True))
    if not matched:
        raise UserError(f"PATHS: no file matches {path!r}; valid: images, folders, patterns, or a store")
    return [name for one in matched for name in (_list_folder_images(one) if os.path.isdir(one) else [one])]


def _list_folder_images(folder: str) -> list[str]:
    try:
        images = scan_folder(LocalFiles(Path(folder))).images
    except OSError as error:
        raise UserError(f"PATHS: {folder!r} cannot be read: {describe_os_error(error)}") from None
    if not images:
        raise UserError(f"PATHS: no images ({' '.join(IMAGE_SUFFIXES)}) in {folder!r}")
    return [os.path.join(folder, os.fsdecode(name)) for name in sorted(facts[0] for facts in images)]
