"""Assembles a store from the results of its jobs: ids without gaps, side tables and the manifest."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.duplicates import write_duplicates
from firstlight.pipeline.data.image_statistics import SourceStatistics
from firstlight.pipeline.data.images.shrink import SHRINKING_RULES, STORED_JPEG_QUALITY
from firstlight.pipeline.data.manifest import (
    DAMAGE_ERRORS,
    MANIFEST_FILE,
    QUARANTINE_FILE,
    STORE_FORMAT,
    EarlierStore,
    Shard,
    advise_repair,
    manifest_hash,
)
from firstlight.pipeline.data.parquet import read_parquet_table
from firstlight.pipeline.data.prepare.jobs import (
    JobRunner,
    PrepareJob,
    ShardRenumberer,
    read_gaps,
    read_quarantined,
)
from firstlight.pipeline.data.prepare.level_ranges import decide_levels
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.subsets import NO_IDS, write_subsets
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_path
from firstlight.pipeline.records import write_sealed_json

QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("split", pa.string()), ("reason", pa.string())])


def assemble_store(
    folder: Path,
    source: Source,
    old: Store | None,
    results: list[PrepareJob],
    statistics: SourceStatistics,
    run_jobs: JobRunner,
    *,
    root: str | None,
    depth: int | None = None,
    side: int | None = None,
) -> None:
    """Numbers the images of the jobs' shards, then writes the side tables and, last, the manifest.

    `results`: of all jobs, in source order. `statistics`: of the images of `old` and of the jobs. `root`: the location
    of the source, for the manifest. `depth`: `dataset.depth`. `side`: that of `PartWriter`.

    Raises:
        UserError: no training image can be decoded, storage cannot be written, or the new images need another range of
            levels than those of `old`.
    """
    _write_quarantine(folder, results)
    shards = _number_shards(results, old.shards if old else (), folder, run_jobs)
    num_bad = sum(result["quarantined"] for result in results)
    if not any(shard.split == "train" for shard in shards):
        problem = describe_bad_images(folder, num_bad, sum(source.splits.values()))
        raise UserError(f"{problem}; no image is left for training")
    levels = decide_levels(statistics.whole.levels, depth, old)
    lost = _find_lost_classes(source, statistics) if num_bad else {}
    counted = statistics.dump()
    shrunk = {**counted.pop("shrunk", {}), "side": side, "quality": STORED_JPEG_QUALITY, "rules": SHRINKING_RULES}
    images = {
        **counted,
        **({"shrunk": shrunk} if side is not None else {}),
        **({"lost_classes": lost} if lost else {}),
        **({"levels": levels} if levels else {}),
        "duplicates": write_duplicates(folder, shards),
    }
    earlier_subsets = {name: old.subset(name) for name in old.subset_names} if old else {}
    train_ids = _list_train_ids(source, results, shards, folder)
    train_rows = source.rows.get("train", NO_IDS)
    subsets = write_subsets(folder, source.subsets, train_rows, train_ids, earlier_subsets)
    annotations = list(source.annotations)
    facts = {"quarantined": num_bad, "annotations": annotations, "images": images, "subsets": subsets}
    write_sealed_json(folder / MANIFEST_FILE, _build_store_manifest(source, old, shards, facts, root))


def _find_lost_classes(source: Source, statistics: SourceStatistics) -> dict[str, list[int]]:
    """Returns the classes that a split has in the source and not in the store, as no image of them can be decoded."""
    lost = {}
    for split, rows in source.rows.items():
        kept = statistics.splits[split].labels if split in statistics.splits else Counter[int]()
        listed = np.unique(source.labels[rows]).tolist()
        if gone := [label for label in listed if label >= 0 and not kept[label]]:
            lost[split] = gone
    return lost


def _number_shards(
    results: list[PrepareJob], old_shards: tuple[Shard, ...], folder: Path, run_jobs: JobRunner
) -> list[Shard]:
    """Returns all shards, with ids 0..n-1 without gaps.

    Shards after a bad image are rewritten with other ids, unless a killed process did so before.
    """
    shards = [*old_shards, *(Shard(**result["shard"]) for result in results if result["shard"])]
    firsts = np.cumsum([0, *(shard.count for shard in shards)]).tolist()
    moved = [
        {"file": shard.file, "first_id": first}
        for shard, first in zip(shards, firsts, strict=False)
        if shard.first_id != first
    ]
    rewritten = {
        result["shard"]["file"]: Shard(**result["shard"]) for result in run_jobs(ShardRenumberer(folder), moved)
    }
    return [rewritten.get(shard.file, shard) for shard in shards]


def _write_quarantine(folder: Path, results: list[PrepareJob]) -> None:
    """Writes path, split and reason of the images that cannot be decoded, one part of the source at a time."""
    with atomic_path(folder / QUARANTINE_FILE) as temporary, pq.ParquetWriter(temporary, QUARANTINE_SCHEMA) as writer:
        for job in (result["job"] for result in results if result["quarantined"]):
            paths, reasons = zip(*read_quarantined(folder, job), strict=True)
            writer.write_table(pa.table([paths, [job["split"]] * len(paths), reasons], schema=QUARANTINE_SCHEMA))


def _list_train_ids(source: Source, results: list[PrepareJob], shards: list[Shard], folder: Path) -> np.ndarray:
    """Returns the id of each image of the training split, (n,) int64; -1 if it cannot be decoded.

    Returns an empty array if the source has no subsets: nobody needs the ids.
    """
    if not source.subsets:
        return NO_IDS
    ids, firsts = np.full(source.splits.get("train", 0), -1, np.int64), {shard.file: shard.first_id for shard in shards}
    for job in (result["job"] for result in results if result["shard"] and result["job"]["split"] == "train"):
        rows = np.delete(np.arange(job["start"], job["start"] + job["count"]), read_gaps(folder, job))
        ids[rows] = firsts[job["file"]] + np.arange(len(rows))
    return ids


def _build_store_manifest(
    source: Source, old: Store | None, shards: list[Shard], facts: dict[str, Any], root: str | None
) -> dict[str, Any]:
    splits = Counter[str]()
    for shard in shards:
        splits[shard.split] += shard.count
    extends = (*old.extends, EarlierStore(old.path.resolve().name, old.hash, old.extension_edges[-1])) if old else ()
    raw = {
        "format": STORE_FORMAT,
        "source": {
            "kind": source.kind,
            "root": root,
            "fingerprint": source.fingerprint,
            **({"identity": source.identity} if source.identity else {}),
            **({"reading": list(source.reading)} if source.reading else {}),
            **({"notes": list(source.notes)} if source.notes else {}),
            **({"draws_test": True} if source.draws_test else {}),
        },
        "extends": [asdict(earlier) for earlier in extends],
        "classes": list(source.classes),
        "splits": dict(splits),
        "shards": [asdict(shard) for shard in shards],
        **facts,
    }
    return {**raw, "hash": manifest_hash(raw)}


def describe_bad_images(folder: Path, num_bad: int, total: int) -> str:
    """Returns how many images cannot be decoded, and the first of them.

    Raises:
        UserError: the list of these images is missing or damaged.
    """
    file = folder / QUARANTINE_FILE
    try:
        first = read_parquet_table(file).slice(0, 1).to_pylist()[0]
        path, reason = " ".join(first["path"].split()), first["reason"]
    except (*DAMAGE_ERRORS, IndexError) as error:
        problem = f"is missing or damaged: {type(error).__name__}"
        raise UserError(f"{file}: {problem}; {advise_repair(folder)}") from None
    return f"{num_bad} of {total} images cannot be decoded, e.g. {path}: {reason}; all are listed in {file}"
