"""Files of predictions: Parquet of probabilities, masks as PNG files with an index, and objects as COCO's JSON.

A file is whole or absent. Images that cannot be used are in a file of their own, with the reason.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_path, temporary_path
from firstlight.pipeline.stages.prediction.answers import ImageClasses, ImageMask, ImageObjects
from firstlight.pipeline.stages.prediction.image_items import ImageItems, StoreImages
from firstlight.pipeline.stages.prediction.predictor import ItemAnswer
from firstlight.pipeline.stages.prediction.saved_model import SavedModel
from firstlight.tasks.downstream.segment import voc_palette

# Rows of a Parquet file that are written at a time.
ROWS_PER_BATCH = 1024
MASKS_FOLDER, MASK_INDEX_FILE = "masks", "predictions.parquet"
REFUSED_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string())])
DEFAULT_OUTPUTS = {
    "label": "predictions.parquet",
    "present": "predictions.parquet",
    "mask": "predictions",
    "boxes": "predictions.json",
}
OUTPUT_ENDINGS = {"label": ".parquet", "present": ".parquet", "mask": "", "boxes": ".json"}


class AnswerWriter(ABC):
    """Writes the answers for the images of `items`, in order, to `out`: `with` it, `add_answers` as they come.

    If the block raises, nothing of them is left.
    """

    def __init__(self, out: Path, model: SavedModel, items: ImageItems, reference: str) -> None:
        self.out, self.model, self.items, self.reference = out, model, items, reference
        self.refused: list[tuple[str, str]] = []

    def __enter__(self) -> "AnswerWriter":
        self.open_output()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.close_output(keep=kind is None)
        if kind is None and self.refused:
            paths, reasons = zip(*self.refused, strict=True)
            _write_table(self.refused_file, pa.table([paths, reasons], schema=REFUSED_SCHEMA))

    @property
    def refused_file(self) -> Path:
        """The file of the images that cannot be used; it is written if there are any."""
        return self.out.with_name(f"{self.out.stem}-quarantine.parquet")

    def add_answers(self, found: Sequence[ItemAnswer]) -> list[str]:
        """Writes the next answers. Returns what the images are called."""
        names = self.items.name_images([item.position for item in found])
        for item, name in zip(found, names, strict=True):
            if item.answer is None:
                self.refused.append((name, str(item.reason)))
            else:
                self.write_answer(item, name)
        return names

    @abstractmethod
    def open_output(self) -> None:
        """Opens temporary files beside `out`."""

    @abstractmethod
    def write_answer(self, item: ItemAnswer, name: str) -> None:
        """Writes an answer."""

    @abstractmethod
    def close_output(self, keep: bool) -> None:
        """Puts the files in their place, or removes them."""


class _TableFile:
    """A Parquet file that is written row by row, and is whole or absent."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self.file, self.schema, self.rows = file, schema, list[dict[str, Any]]()
        self.temporary = temporary_path(file.parent)
        self.writer = pq.ParquetWriter(self.temporary, schema, compression="zstd", write_page_checksum=True)

    def write_row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) >= ROWS_PER_BATCH:
            self._flush_rows()

    def _flush_rows(self) -> None:
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
            self.rows = []

    def close_file(self, keep: bool) -> None:
        try:
            if keep:
                self._flush_rows()
            self.writer.close()
            if keep:
                self.temporary.replace(self.file)
        finally:
            self.temporary.unlink(missing_ok=True)


def _write_table(file: Path, table: pa.Table) -> None:
    with atomic_path(file) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


class ClassWriter(AnswerWriter):
    """Writes a Parquet file with a row for each image: path, class, probability, and the probabilities of all classes.

    The classes are in the file's metadata, as JSON. Rows of a store also have `id` and `split`.
    """

    def open_output(self) -> None:
        fields = [("path", pa.string()), ("class", pa.string()), ("probability", pa.float32())]
        fields += [("probabilities", pa.list_(pa.float32(), len(self.model.classes)))]
        fields += [("id", pa.int64()), ("split", pa.string())] if isinstance(self.items, StoreImages) else []
        self.table = _TableFile(self.out, pa.schema(fields, metadata=describe_answers(self.model, self.reference)))

    def write_answer(self, item: ItemAnswer, name: str) -> None:
        answer = item.answer
        assert isinstance(answer, ImageClasses)
        row = {"path": name, "class": answer.class_name, "probability": answer.probability}
        self.table.write_row(
            row | {"probabilities": answer.probabilities} | _locate_in_store(self.items, item.position)
        )

    def close_output(self, keep: bool) -> None:
        self.table.close_file(keep)


class MaskWriter(AnswerWriter):
    """Writes a folder: `masks/`, a PNG of each image at its own size, whose colours are indices of classes, and an
    index of them in Parquet with the share of each class.
    """

    def open_output(self) -> None:
        self.folder = temporary_path(self.out.parent)
        (self.folder / MASKS_FOLDER).mkdir(parents=True)
        fields = [("path", pa.string()), ("mask", pa.string()), ("width", pa.int64()), ("height", pa.int64())]
        fields += [("shares", pa.list_(pa.float64(), len(self.model.classes)))]
        fields += [("id", pa.int64()), ("split", pa.string())] if isinstance(self.items, StoreImages) else []
        metadata = describe_answers(self.model, self.reference)
        self.table = _TableFile(self.folder / MASK_INDEX_FILE, pa.schema(fields, metadata=metadata))
        self.palette = (voc_palette(256) * 255).round().byte().flatten().tolist()
        self.taken = set[str]()

    @property
    def refused_file(self) -> Path:
        return self.out / "quarantine.parquet"

    def write_answer(self, item: ItemAnswer, name: str) -> None:
        answer = item.answer
        assert isinstance(answer, ImageMask)
        image = Image.fromarray(answer.mask, "L")
        image.putpalette(self.palette)
        place = _locate_in_store(self.items, item.position)
        file = f"{MASKS_FOLDER}/{self._choose_name(name, place)}"
        image.save(self.folder / file)
        height, width = answer.mask.shape
        row = {"path": name, "mask": file, "width": width, "height": height, "shares": answer.measure_shares()}
        self.table.write_row(row | place)

    def _choose_name(self, name: str, place: dict[str, Any]) -> str:
        """Returns the name of a mask: that of the image with another ending; of an image of a store, its id.

        Where two images would have one, the second has its own ending too, and a number if that is taken as well.
        """
        path = PurePosixPath(name)
        stem = f"{place['id']:08d}" if place else path.stem.strip(".") or "image"
        whole = path.name.strip(".") or "image"
        candidates = [f"{stem}.png", f"{whole}.png", *(f"{whole}-{k}.png" for k in range(2, len(self.taken) + 3))]
        chosen = next(one for one in candidates if one.lower() not in self.taken)
        self.taken.add(chosen.lower())
        return chosen

    def close_output(self, keep: bool) -> None:
        try:
            self.table.close_file(keep)
            if keep:
                if self.out.exists():
                    shutil.rmtree(self.out)
                self.folder.rename(self.out)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


class ObjectWriter(AnswerWriter):
    """Writes COCO's JSON: the images, the classes from 1 on as categories, and an annotation with a score for each
    object, whose `bbox` is left, top, width and height in pixels of the image.
    """

    def open_output(self) -> None:
        self.temporary, self.part = temporary_path(self.out.parent), temporary_path(self.out.parent)
        # The annotations wait in a file of their own until all images are listed.
        self.images: IO[str] = self.temporary.open("w", encoding="utf-8")
        self.objects: IO[str] = self.part.open("w+", encoding="utf-8")
        self.counts = [0, 0]
        categories = [{"id": k, "name": name} for k, name in enumerate(self.model.classes, 1)]
        info = {"description": "predictions of Firstlight", "model": self.reference}
        self.images.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": [')

    def write_answer(self, item: ItemAnswer, name: str) -> None:
        answer = item.answer
        assert isinstance(answer, ImageObjects)
        assert item.size is not None
        image = {"id": item.position, "file_name": name, "width": item.size[0], "height": item.size[1]}
        place = _locate_in_store(self.items, item.position)
        self._append(self.images, 0, {**image, **place, "id": place.get("id", item.position)})
        for box, score, label in zip(
            answer.boxes.tolist(), answer.scores.tolist(), answer.labels.tolist(), strict=True
        ):
            width, height = box[2] - box[0], box[3] - box[1]
            described = {"id": self.counts[1] + 1, "image_id": place.get("id", item.position), "category_id": label + 1}
            described |= {"bbox": [box[0], box[1], width, height], "area": width * height, "iscrowd": 0, "score": score}
            self._append(self.objects, 1, described)

    def _append(self, file: IO[str], kind: int, row: dict[str, Any]) -> None:
        file.write(f"{',' * bool(self.counts[kind])}\n{json.dumps(row)}")
        self.counts[kind] += 1

    def close_output(self, keep: bool) -> None:
        try:
            if keep:
                self.images.write('\n],\n"annotations": [')
                self.objects.seek(0)
                shutil.copyfileobj(self.objects, self.images)
                self.images.write("\n]}\n")
            self.images.close()
            if keep:
                self.temporary.replace(self.out)
        finally:
            self.images.close()
            self.objects.close()
            for file in (self.temporary, self.part):
                file.unlink(missing_ok=True)


WRITERS: dict[str, type[AnswerWriter]] = {
    "label": ClassWriter,
    "present": ClassWriter,
    "mask": MaskWriter,
    "boxes": ObjectWriter,
}


def describe_answers(model: SavedModel, reference: str) -> dict[str, str]:
    """Returns what the metadata of a table of predictions say: the task, the classes as JSON, and the model."""
    return {"task": str(model.spec["name"]), "classes": json.dumps(model.classes), "model": reference}


def _locate_in_store(items: ImageItems, position: int) -> dict[str, Any]:
    """Returns the id and the split of an image of a store; {} of other images."""
    if not isinstance(items, StoreImages):
        return {}
    image_id = int(items.ids[position])
    shard = next(one for one in items.store.shards if one.first_id <= image_id < one.first_id + one.count)
    return {"id": image_id, "split": shard.split}


def choose_output(target: str, out: str | None, force: bool) -> Path:
    """Returns the path of the predictions, which is free.

    Raises:
        UserError: it has another ending than such predictions have, exists, or lies in no folder; names `--out`.
    """
    path, ending = Path(out or DEFAULT_OUTPUTS[target]), OUTPUT_ENDINGS[target]
    what = {"mask": "a folder of masks", "boxes": "a .json file of boxes"}.get(target, "a .parquet file")
    if (ending and path.suffix.lower() != ending) or not path.name:
        raise UserError(f"--out: {str(path)!r} is not valid; valid: {what}, such as {DEFAULT_OUTPUTS[target]}")
    if not path.parent.is_dir():
        raise UserError(f"--out: {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists() and path.is_dir() != (target == "mask"):
        raise UserError(f"--out: {str(path)!r} is {'a folder' if path.is_dir() else 'a file'}; valid: {what}")
    if path.exists() and not force:
        raise UserError(f"--out: {str(path)!r} exists; valid: another path, or --force to replace it")
    if path.is_dir() and any(path.iterdir()) and not (path / MASK_INDEX_FILE).is_file():
        raise UserError(f"--out: {str(path)!r} is a folder of other files, which --force does not replace")
    return path
