"""The jobs of `prepare`: one writes a part of the source as a shard, one renumbers a shard. Each can be repeated.

Each shard has a record file: what was found in the part, and the sha256 of the shard. The record is written after the
shard is in place. A part is finished if its record is whole and its shard has that sha256; otherwise the part is
decoded again, to the same bytes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import simplejpeg
from PIL.Image import Image

from firstlight.pipeline.data.annotations import count_annotations, pack_columns
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.image_statistics import ImageStatistics
from firstlight.pipeline.data.images import BadImage, open_rgb
from firstlight.pipeline.data.images.decode import ImageFrame
from firstlight.pipeline.data.images.levels import check_depth, list_pixel_readings
from firstlight.pipeline.data.images.orientation import turn_size
from firstlight.pipeline.data.images.shrink import DECODED_SIDE_RATIO, SHRINKING_RULES, find_own_size, shrink_image
from firstlight.pipeline.data.manifest import DAMAGE_ERRORS, STORE_FORMAT, Shard, canonical_json, file_sha256
from firstlight.pipeline.data.prepare.fitting import fit_annotation
from firstlight.pipeline.data.shards import (
    ShardRow,
    read_annotation_columns,
    read_shard_rows,
    short_digest,
    write_shard,
)
from firstlight.pipeline.data.sources import Record, Source, SourcePart
from firstlight.pipeline.errors import describe_os_error, one_line
from firstlight.pipeline.files import write_atomically

# Changes with the rules by which images and annotations are read.
READING_RULES = 1
# Versions that decide a shard's bytes: parts that another version wrote are decoded again.
MADE_BY = {
    "format": STORE_FORMAT,
    "readings": READING_RULES,
    "shrinking": SHRINKING_RULES,
    "Pillow": PIL.__version__,
    "simplejpeg": simplejpeg.__version__,
    "pyarrow": pa.__version__,
}
# A job, its record and its result are JSON objects: they travel between processes.
PrepareJob = dict[str, Any]
# Images of a part between two reports of a `PartWriter`.
IMAGES_PER_REPORT = 32
# A function that runs another one for each of some jobs and yields the results in any order.
JobRunner = Callable[[Callable[[PrepareJob], PrepareJob], list[PrepareJob]], Iterator[PrepareJob]]


def list_jobs(source: Source, rows: int) -> list[PrepareJob]:
    """Returns a job for `PartWriter` per part of `rows` images, in source order; ids as if every image were good."""
    offset = {split: sum(list(source.splits.values())[:k]) for k, split in enumerate(source.splits)}
    return [
        {
            **asdict(part),
            "file": f"{part.split}-{part.start // rows:05d}.parquet",
            "first_id": offset[part.split] + part.start,
        }
        for part in source.split_into_parts(rows)
    ]


@dataclass(frozen=True)
class PartWriter:
    """Job that reads a part of the source, decodes its images and writes the good ones as a shard.

    A part that is finished already is only checked.
    """

    source: Source
    folder: Path
    max_pixels: int
    # `dataset.depth`
    depth: int | None = None
    # The shorter side that larger images are stored with, in pixels; None: all are stored as they are.
    side: int | None = None
    # The format of the pixels that the data set states; None: images become RGB of 8 bits.
    pixels: PixelFormat | None = None
    # A function that is called with a job and the number of its images that are done. It stays in the process.
    report: Callable[[PrepareJob, int], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "report": None}

    def __call__(self, job: PrepareJob) -> PrepareJob:
        """Maps {split, start, count, file, first_id} to {job, shard or None, quarantined: count, census} or {error}."""
        file = self.folder / job["file"]
        try:
            record = read_finished_record(file, job) or self._write(job)
        except OSError as error:
            return {"error": describe_storage_error(file, error)}
        return _summarise_record(record)

    def _write(self, job: PrepareJob) -> PrepareJob:
        statistics, bad = ImageStatistics(), dict[int, list[str]]()
        shard = Shard(job["file"], job["split"], job["first_id"], 0, (), 0, "")
        rows = self._decode_rows(job, statistics, bad)
        written = write_shard(self.folder, shard, rows, self.source.annotations)
        found = {"quarantined": list(bad.values()), "gaps": list(bad), "census": statistics.dump()}
        record = {"job": job, "made_by": MADE_BY, "shard": written and asdict(written), **found}
        write_record(self.folder / job["file"], record)
        return record

    def _decode_rows(
        self, job: PrepareJob, statistics: ImageStatistics, bad: dict[int, list[str]]
    ) -> Iterator[ShardRow]:
        """Yields the rows of the good images, which it adds to `statistics`.

        Puts path and reason of the others into `bad`, by their position in the part.
        """
        part = SourcePart(job["split"], job["start"], job["count"])
        for position, record in enumerate(self.source.read(part)):
            if self.report is not None and position and position % IMAGES_PER_REPORT == 0:
                self.report(job, position)
            try:
                data, image = self._decode_image(record)
                frame = _find_image_frame(image)
                annotation = record.annotation and fit_annotation(
                    record.annotation, frame, len(self.source.classes), record.annotation_file
                )
            except BadImage as error:
                bad[position] = [record.path, one_line(error, limit=None)]
                statistics.refused[error.kind] += 1
                continue
            kind = str(image.info["mode"]), str(image.info["format"])
            counts = count_annotations(annotation, frame.upright) if annotation else None
            stored, shown, size = data, image, frame.upright
            if (
                self.side is not None
                and isinstance(image, Image)
                and (small := shrink_image(data, image, self.side)) is not None
            ):
                stored, shown, size = small.data, small.pixels, small.pixels.size
                statistics.add_shrunk(len(data), len(stored))
            statistics.add(size, kind, record.label, len(stored), counts)
            _count_readings(statistics, shown)
            statistics.readings.update(annotation.readings if annotation else {})
            columns = pack_columns(annotation, self.source.annotations)
            yield stored, record.label, record.path, short_digest(data), *columns

    def _decode_image(self, record: Record) -> tuple[bytes, Image | ChannelImage]:
        """Returns the bytes and the pixels of a record; pixels of more than 8 bits are not scaled for the set yet.

        Raises:
            BadImage: there are none, or the pixels have levels beyond `dataset.depth`, or another format than stated.
        """
        if record.data is None:
            raise BadImage(str(record.reason), "not read")
        if self.pixels is not None:
            return record.data, open_channels(record.data, self.pixels, self.max_pixels)
        if self.side is None:
            image = open_rgb(record.data, self.max_pixels)
        else:
            image = open_rgb(record.data, self.max_pixels, least_side=DECODED_SIDE_RATIO * self.side)
        if self.depth is not None and "levels" in image.info:
            kind, low, high = image.info["levels"]
            check_depth(kind, low, high, self.depth)
        return record.data, image


def _find_image_frame(image: Image | ChannelImage) -> ImageFrame:
    orientation, size = int(image.info.get("orientation", 1)), find_own_size(image)
    return ImageFrame(turn_size(size, orientation), size, orientation)


def _count_readings(statistics: ImageStatistics, image: Image | ChannelImage) -> None:
    """Counts what was decided in reading an image, and its colours, or the levels of one of more than 8 bits."""
    statistics.readings.update(image.info.get("readings", ()))
    if "orientation" in image.info:
        statistics.readings["oriented"] += 1
    if isinstance(image, ChannelImage):
        statistics.readings.update(["one_colour"] * statistics.channels.add_image(image))
        statistics.colours.add_levels(image.values, int(np.iinfo(image.values.dtype).max))
    elif "levels" in image.info:
        statistics.add_levels(*image.info["levels"])
    else:
        statistics.readings.update(list_pixel_readings(image))
        # The colours of deeper images are known once the whole set has decided what is white.
        statistics.colours.add_image(image)


@dataclass(frozen=True)
class ShardRenumberer:
    """Job that rewrites a shard with other ids.

    If it is killed between writing the shard and its record, that one part is decoded again.
    """

    folder: Path

    def __call__(self, job: PrepareJob) -> PrepareJob:
        """Maps {file, first_id}, the shard and its new first id, to a result like that of `PartWriter`."""
        file = self.folder / job["file"]
        try:
            record = json.loads(record_path(file).read_bytes())["record"]
            shard = replace(Shard(**record["shard"]), first_id=job["first_id"])
            written = write_shard(self.folder, shard, read_shard_rows(file), read_annotation_columns(file))
            record["shard"] = written and asdict(written)
            write_record(file, record)
        except DAMAGE_ERRORS as error:
            return {"error": describe_storage_error(file, error)}
        return _summarise_record(record)


def read_finished_record(file: Path, job: PrepareJob) -> PrepareJob | None:
    """Returns the record of a part, or None if it is not finished, damaged or of another version."""
    try:
        raw = json.loads(record_path(file).read_bytes())
        record: PrepareJob = raw["record"]
        if raw["sha256"] != _hash_record(record) or (record["job"], record["made_by"]) != (job, MADE_BY):
            return None
        shard = record["shard"]
        if shard and (file.stat().st_size != shard["bytes"] or file_sha256(file) != shard["sha256"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record


def read_quarantined(folder: Path, job: PrepareJob) -> list[list[str]]:
    """Returns [path, reason] of the images of a finished part that cannot be decoded."""
    found: list[list[str]] = json.loads(record_path(folder / job["file"]).read_bytes())["record"]["quarantined"]
    return found


def read_gaps(folder: Path, job: PrepareJob) -> list[int]:
    """Returns the positions in a finished part of the images that cannot be decoded, ascending."""
    found: list[int] = json.loads(record_path(folder / job["file"]).read_bytes())["record"]["gaps"]
    return found


def _summarise_record(record: PrepareJob) -> PrepareJob:
    """Returns a record without paths: the driver keeps one per part."""
    return {**{key: value for key, value in record.items() if key != "gaps"}, "quarantined": len(record["quarantined"])}


def record_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def write_record(shard: Path, record: PrepareJob) -> None:
    """Writes a record with its own hash, next to the shard."""
    write_atomically(record_path(shard), canonical_json({"record": record, "sha256": _hash_record(record)}))


def _hash_record(record: PrepareJob) -> str:
    return sha256(canonical_json(record)).hexdigest()


def describe_storage_error(path: Path, error: BaseException) -> str:
    """Returns an error of the storage on one line, with the name of the file, which is `path` for temporary files."""
    name = getattr(error, "filename", None)
    file = name if name and not str(name).endswith(".tmp") else path
    return f"{file}: cannot be written: {describe_os_error(error, limit=None)}"
