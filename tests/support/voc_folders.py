"""Folders in the layout of PASCAL VOC, with lists, objects and masks, and the stores that are prepared from them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from firstlight.pipeline.data.store import Store
from tests.support.image_sources import dataset_options, prepare_store
from tests.support.published_sets import write_jpegs, write_texts


def write_voc(root: Path, folder: str = "ImageSets/Main", **lists: str) -> Path:
    """Writes six images and the given lists of image names."""
    write_jpegs(root, *(f"JPEGImages/{k:06d}.jpg" for k in range(6)))
    return write_texts(root, **{f"{folder}/{name}".replace("/", "__"): content for name, content in lists.items()})


ObjectRow = tuple[str, tuple[int, int, int, int], int]  # name, xmin ymin xmax ymax as the file has them, difficult


def write_objects(root: Path, image: int, *objects: ObjectRow, extra: str = "") -> None:
    """Writes the annotation file of an image."""
    found = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult><part><name>head</name></part><bndbox>"
        + "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox></object>"
        for name, box, hard in objects
    )
    file = root / f"Annotations/{image:06d}.xml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"<annotation><filename>x</filename>{extra}{found}</annotation>")


CAT, DOG, HARD_DOG = ("cat", (1, 1, 6, 4), 0), ("dog", (2, 2, 3, 4), 0), ("dog", (3, 1, 6, 2), 1)


def prepare_voc_store(root: Path, **fields: Any) -> Store:
    return prepare_store(
        dataset_options(source="voc", root=root, max_bad_fraction=0.9, **fields), root.parent / f"{root.name}-stores"
    )


def write_mask(root: Path, image: int, values: Any) -> bytes:
    """Writes the mask of an image as a PNG with a palette, and returns its bytes."""
    file = io.BytesIO()
    array = np.array(values, np.uint8)
    map_ = Image.frombytes("P", array.shape[::-1], array.tobytes())
    map_.putpalette(bytes(range(255, -1, -1)) * 3)
    map_.save(file, "PNG")
    path = root / f"SegmentationClass/{image:06d}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(file.getvalue())
    return file.getvalue()
