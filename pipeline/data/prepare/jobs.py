"""The jobs of `prepare`: a part of the source becomes a shard, and a shard gets other ids. Each can be done again, by whoever comes after a kill.

Beside a shard lies its record: what was found in the part, and the sha256 of the shard. It is written when the shard is in place, so a part
counts as done if its record is whole and its shard is the one that the record tells of; otherwise it is decoded again, to the same bytes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa
from PIL.Image import Image

from firstlight.pipeline.data.annotations import Annotation, fitted, packed, tally
from firstlight.pipeline.data.image_statistics import Census
from firstlight.pipeline.data.images import BadImage, open_rgb
from firstlight.pipeline.data.shards import Row, annotations_of, read_rows, write_shard
from firstlight.pipeline.data.sources import Part, Record, Source
from firstlight.pipeline.data.store import DAMAGE, FORMAT, Shard, canonical, file_sha256
from firstlight.pipeline.files import write_atomically

# What else decides a shard's bytes: parts of another version are decoded again
MADE_BY = {"format": FORMAT, "Pillow": PIL.__version__, "pyarrow": pa.__version__}
Job = dict[str, Any]  # plain JSON, in and out: what travels between processes
Each = Callable[[Callable[[Job], Job], list[Job]], Iterator[Job]]  # does the jobs, in any order


def jobs(source: Source, rows: int) -> list[Job]:
    """A job for `PartWriter` per part of `rows` images, in source order. Ids are those of a source without a bad image."""
    offset = {split: sum(list(source.splits.values())[:k]) for k, split in enumerate(source.splits)}
    return [
        {
            **asdict(part),
            "file": f"{part.split}-{part.start // rows:05d}.parquet",
            "first_id": offset[part.split] + part.start,
        }
        for part in source.parts(rows)
    ]


@dataclass(frozen=True)
class PartWriter:
    """Job: read one part of the source, decode its images, write the good ones as a shard; nothing of it, where that was done before."""

    source: Source
    folder: Path
    max_pixels: int

    def __call__(self, job: Job) -> Job:
        """{split, start, count, file, first_id} -> {job, shard or None, quarantined: how many, census} or {error}."""
        file = self.folder / job["file"]
        try:
            record = finished(file, job) or self._write(job)
        except OSError as error:
            return {"error": storage_problem(file, error)}
        return _summary(record)

    def _write(self, job: Job) -> Job:
        census, bad = Census(), dict[int, list[str]]()
        shard = Shard(job["file"], job["split"], job["first_id"], 0, (), 0, "")
        rows = self._good(Part(job["split"], job["start"], job["count"]), census, bad)
        written = write_shard(self.folder, shard, rows, self.source.annotations)
        found = {"quarantined": list(bad.values()), "gaps": list(bad), "census": census.dump()}
        record = {"job": job, "made_by": MADE_BY, "shard": written and asdict(written), **found}
        write_record(self.folder / job["file"], record)
        return record

    def _good(self, part: Part, census: Census, bad: dict[int, list[str]]) -> Iterator[Row]:
        """The rows that can be decoded, counted in `census`; the others go to `bad`, by their place in the part."""
        for place, record in enumerate(self.source.read(part)):
            try:
                if record.data is None:
                    raise BadImage(record.reason)
                image = open_rgb(record.data, self.max_pixels)
                annotation = record.annotation and _checked(record, record.annotation, image, len(self.source.classes))
            except BadImage as error:
                bad[place] = [record.path, " ".join(str(error).split())]
                continue
            kind = str(image.info["mode"]), str(image.info["format"])
            census.add(
                image.size, kind, record.label, len(record.data), tally(annotation, image.size) if annotation else None
            )
            yield record.data, record.label, record.path, *packed(annotation, self.source.annotations)


def _checked(record: Record, annotation: Annotation, image: Image, classes: int) -> Annotation:
    """Raises BadImage: it does not fit the image, or places in it are of no use, as it is not known which way up they mean it."""
    if "turned" in image.info and (annotation.boxes is not None or annotation.mask is not None):
        means = "and whether its annotation means it before or after that is not said"
        raise BadImage(f"{record.annotated_in}: the image has EXIF orientation {image.info['turned']}, {means}")
    return fitted(annotation, image.size, classes, record.annotated_in)


@dataclass(frozen=True)
class Renumber:
    """Job: write a shard again with other ids. A kill between the shard and its record costs the decoding of that one part."""

    folder: Path

    def __call__(self, job: Job) -> Job:
        """{file, first_id}: the shard and its new first id -> as `PartWriter`."""
        file = self.folder / job["file"]
        try:
            record = json.loads(record_of(file).read_bytes())["record"]
            written = write_shard(
                self.folder,
                replace(Shard(**record["shard"]), first_id=job["first_id"]),
                read_rows(file),
                annotations_of(file),
            )
            record["shard"] = written and asdict(written)
            write_record(file, record)
        except DAMAGE as error:
            return {"error": storage_problem(file, error)}
        return _summary(record)


def finished(file: Path, job: Job) -> Job | None:
    """The record of a part that is done; None: it is not, or by another version, or its shard is not whole."""
    try:
        raw = json.loads(record_of(file).read_bytes())
        record: Job = raw["record"]
        if raw["sha256"] != _hash(record) or (record["job"], record["made_by"]) != (job, MADE_BY):
            return None
        shard = record["shard"]
        if shard and (file.stat().st_size != shard["bytes"] or file_sha256(file) != shard["sha256"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record


def quarantined(folder: Path, job: Job) -> list[list[str]]:
    """[path, reason] of the images of a finished part that cannot be decoded."""
    found: list[list[str]] = json.loads(record_of(folder / job["file"]).read_bytes())["record"]["quarantined"]
    return found


def gaps(folder: Path, job: Job) -> list[int]:
    """Places in a finished part of the images that cannot be decoded, ascending."""
    found: list[int] = json.loads(record_of(folder / job["file"]).read_bytes())["record"]["gaps"]
    return found


def _summary(record: Job) -> Job:
    """Without the paths: the driver keeps one of these per part."""
    return {**{key: value for key, value in record.items() if key != "gaps"}, "quarantined": len(record["quarantined"])}


def record_of(shard: Path) -> Path:
    return shard.with_suffix(".json")


def write_record(shard: Path, record: Job) -> None:
    write_atomically(record_of(shard), canonical({"record": record, "sha256": _hash(record)}))


def _hash(record: Job) -> str:
    return sha256(canonical(record)).hexdigest()


def storage_problem(path: Path, error: BaseException) -> str:
    """One line; temporary names are no help to anybody."""
    name = getattr(error, "filename", None)
    where = name if name and not str(name).endswith(".tmp") else path
    return f"{where}: cannot be written: {getattr(error, 'strerror', None) or ' '.join(str(error).split())}"
