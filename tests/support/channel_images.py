"""Images of many channels and of 16 bits, as satellites and microscopes give them, and folders of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.store import Store
from tests.support import recipes


def draw_bands(seed: int, channels: int = 13, side: int = 32, kind: int = 0, bits: int = 16) -> np.ndarray:
    """Returns (side, side, channels) values of `bits`: noise around a level that differs by channel and `kind`.

    Levels of 16 bits differ in their low bytes, too.
    """
    rng, full = np.random.default_rng(seed), 2**bits - 1
    centre = (np.arange(channels) % 5 + 1 + 3 * kind) / 12
    values = (centre + 0.08 * rng.standard_normal((side, side, channels))).clip(0, 1) * full
    return np.rint(values).astype(np.uint16 if bits == 16 else np.uint8)


def encode_bands(values: np.ndarray, **options: Any) -> bytes:
    """(H, W, C) values -> a TIFF file with the channels side by side."""
    file, layout = io.BytesIO(), {"photometric": "minisblack", "metadata": None}
    plain = values.ndim == 2 or values.shape[2] == 1
    layout |= {} if plain else {"planarconfig": "contig"}
    tifffile.imwrite(file, values.reshape(values.shape[:2]) if plain else values, **{**layout, **options})
    return file.getvalue()


def encode_pages(values: np.ndarray, **options: Any) -> bytes:
    """(H, W, C) values -> a TIFF file with a page for each channel."""
    file = io.BytesIO()
    tifffile.imwrite(
        file, np.ascontiguousarray(values.transpose(2, 0, 1)), photometric="minisblack", metadata=None, **options
    )
    return file.getvalue()


def write_band_folders(root: Path, count: int = 24, **shape: Any) -> Path:
    """Writes `count` TIFF files of each of two classes, as folders of classes."""
    for kind, name in enumerate(("field", "water")):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(count):
            values = draw_bands(1000 * kind + k, kind=kind, **shape)
            (folder / f"{k:03d}.tif").write_bytes(encode_bands(values))
    return root


def band_recipe(storage: Path, root: Path, **changes: Any) -> Recipe:
    """Returns the small recipe on a folder of classes of 13 bands of 16 bits; `changes` as in `recipes.recipe`."""
    dataset = {
        "name": "bands",
        "source": "folder",
        "root": str(root),
        "channels": 13,
        "bits": 16,
        "image_size": 16,
        "test_fraction": 0.2,
        "val_fraction": 0.1,
        "train_augment": [{"op": "random_resized_crop", "scale": [0.5, 1.0]}, {"op": "horizontal_flip"}],
        "eval_augment": [{"op": "center_crop"}],
    }
    encoder = {"name": "convnet", "norm": "sync", "width": 4, "depth": 2}
    return recipes.recipe(
        storage,
        **{"dataset": dataset, "encoder": encoder, "stages__pretrain__batch_size": 12, **changes},
    )


def prepare_bands(recipe: Recipe, storage: Path) -> Store:
    """Prepares the images of a recipe in this process."""
    return prepare(recipe.dataset, storage / "stores", lambda: False, lambda done, total: None)
