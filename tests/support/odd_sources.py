"""Folders, lists, tables and archives as people have them, written in a few lines, and what is told of them."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.data_notes import describe_problems
from tests.support import recipes
from tests.support.image_sources import dataset_options, prepare_store
from tests.support.odd_images import encode_image, make_noise
from tests.support.webdataset_shards import write_shard

# A case writes its input below a folder and returns the keys of `dataset` by which it is read.
WriteCase = Callable[[Path], dict[str, Any]]
NUM_ROWS = 12


def write_images(root: Path, *folders: str, count: int = 6) -> Path:
    """Writes so many different images into each folder."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            seed = sum(map(ord, folder)) * 100 + k
            (root / folder / f"{k}.png").write_bytes(encode_image(make_noise(8, 8, seed)))
    return root


def folders_case(*folders: str, count: int = 6, **fields: Any) -> WriteCase:
    return lambda root: {"root": write_images(root, *folders, count=count), **fields}


def list_rows(
    label: Callable[[int], object], delimiter: str = ",", header: str | None = None, path: str = "im/{}.png"
) -> str:
    """Returns the text of a list of `NUM_ROWS` images."""
    rows = [delimiter.join((path.format(k), str(label(k)))) for k in range(NUM_ROWS)]
    return "\n".join([*([delimiter.join(("path", "label"))] if header is None else [header] * bool(header)), *rows, ""])


def list_case(text: str | bytes, name: str = "list.csv", **fields: Any) -> WriteCase:
    """A list of the images im/0.png to im/11.png."""

    def write(root: Path) -> dict[str, Any]:
        write_images(root, "im", count=NUM_ROWS)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return {"source": "list", "list": root / name, **fields}

    return write


def table_case(columns: Callable[[list[bytes]], dict[str, Any]], **fields: Any) -> WriteCase:
    """A Parquet file; `columns` gets eight images."""

    def write(root: Path) -> dict[str, Any]:
        images = [encode_image(make_noise(8, 8, k)) for k in range(8)]
        pq.write_table(pa.table(columns(images)), root / "train-0.parquet")
        return {"source": "parquet", "root": root, **fields}

    return write


def archive_case(members: Callable[[int, bytes], Sequence[tuple[str, bytes]]], *more: Any, **fields: Any) -> WriteCase:
    """An archive of six samples; `members` gets their number and image."""

    def write(root: Path) -> dict[str, Any]:
        samples = [members(k, encode_image(make_noise(8, 8, k))) for k in range(6)]
        write_shard(root / "a.tar", *(member for sample in samples for member in sample), *more)
        return {"source": "webdataset", "root": root, **fields}

    return write


def masks_case(make_mask: Callable[[int], Any], classes: str | None = "ground\ncell\n", **fields: Any) -> WriteCase:
    """Six images in VOC's layout with masks, four of them for training."""

    def write(root: Path) -> dict[str, Any]:
        names = _write_voc_images(root, "Segmentation")
        for k, name in enumerate(names):
            mask = make_mask(k)
            (root / "SegmentationClass").mkdir(exist_ok=True)
            (root / "SegmentationClass" / f"{name}.png").write_bytes(encode_image(mask))
        if classes is not None:
            (root / "classes.txt").write_text(classes)
        return {"source": "voc", "root": root, **fields}

    return write


def boxes_case(*files: str, **fields: Any) -> WriteCase:
    """Six images of 24 x 18 pixels in VOC's layout; `files` are the contents of their annotations, in turn."""

    def write(root: Path) -> dict[str, Any]:
        (root / "Annotations").mkdir(parents=True)
        for k, name in enumerate(_write_voc_images(root, "Main")):
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{files[k % len(files)]}</annotation>")
        return {"source": "voc", "root": root, **fields}

    return write


def _write_voc_images(root: Path, folder: str) -> list[str]:
    names = [f"im{k}" for k in range(6)]
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(encode_image(make_noise(24, 18, k), "JPEG"))
    (root / "ImageSets" / folder).mkdir(parents=True)
    for split, part in (("train", names[:4]), ("test", names[4:])):
        (root / "ImageSets" / folder / f"{split}.txt").write_text("\n".join(part))
    return names


def write_object(name: str, *box: object, besides: str = "") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{besides}<bndbox>{corners}</bndbox></object>"


def read_case(folder: Path, write: WriteCase) -> tuple[Store | None, list[str]]:
    """Returns the store of a case and all lines that are told of it; the error is the only line where it is refused."""
    (folder / "in").mkdir()
    fields = {"source": "folder", "max_bad_fraction": 0.9, "test_fraction": 0.2, **write(folder / "in")}
    options = dataset_options(**fields)
    try:
        store = prepare_store(options, folder / "stores")
    except UserError as error:
        return None, [str(error)]
    recipe = recipes.recipe(folder, dataset=options.model_dump(mode="json"))
    return store, [*store.source.get("reading", ()), *describe_problems(recipe, store)]


def encode_pages(kind: str) -> bytes:
    """Returns three different images in one file: an animation or pages."""
    file = io.BytesIO()
    make_noise(8, 8, 0).save(file, kind, save_all=True, append_images=[make_noise(8, 8, 1), make_noise(8, 8, 2)])
    return file.getvalue()


def make_halves(left: int = 0, right: int = 1) -> np.ndarray:
    """Returns a mask (18, 24) uint8 of two values."""
    return np.repeat(np.array([[left] * 12 + [right] * 12], np.uint8), 18, 0)
