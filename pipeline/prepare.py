"""Stage: any source of images -> a store. Every image is decoded once; what cannot be decoded is listed, never silently dropped.

The images are numbered 0..n-1 over the good ones, in source order, whoever reads them: shards are written side by side as if no image were
bad, and those behind a bad one are numbered again afterwards.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.durable import put_in_place, temporary_in, write_json
from pipeline.errors import StageFailed, UserError
from pipeline.images import BadImage, open_rgb
from pipeline.shards import Row, read_rows, write_shard
from pipeline.sources import Source, open_source
from pipeline.store import (
    DAMAGE,
    FORMAT,
    MANIFEST,
    QUARANTINE,
    SHARD_NAME,
    Shard,
    Store,
    canonical,
    manifest_hash,
    repair,
)

if TYPE_CHECKING:
    from pipeline.config import Dataset  # its methods and tasks bring torch, which no decoding task needs

PART = 2048  # images of the source per task and shard
DECIDING = ("source", "image_column", "label_column", "test_fraction", "split_seed", "max_pixels")  # fields that change the store
QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("split", pa.string()), ("reason", pa.string())])
Job = dict[str, Any]  # plain JSON, in and out: what travels between processes


def prepare(dataset: "Dataset", stores: Path, on_ray: Callable[[], bool], progress: Callable[[int, int], None]) -> Store:
    """The store of `dataset` below `stores`: the finished one if it is there and whole, else written.

    `on_ray` is asked when there is something to write: whether Ray (started by then) does it, or this process. On Ray, `stores` must be storage
    that all nodes share. `progress(done, total)` is called with numbers of images of the source.

    Raises:
        UserError: the source, as `open_source`; too many bad images; a damaged store; storage that cannot be written.
    """
    source = open_source(dataset)
    folder = stores / f"{dataset.name}-{_digest(dataset, source)[:12]}"
    try:
        if (folder / MANIFEST).exists():
            store = Store.open(folder)
            store.verify()
        else:
            store = _prepare_anew(dataset, source, folder, functools.partial(_each, on_ray()), progress)
    except OSError as error:
        raise UserError(_storage_problem(folder, error)) from None
    _check_bad(dataset, store)
    return store


def _digest(dataset: "Dataset", source: Source) -> str:
    fields = {name: getattr(dataset, name) for name in DECIDING}
    return hashlib.sha256(canonical({**fields, "fingerprint": source.fingerprint, "format": FORMAT})).hexdigest()


Each = Callable[[Callable[[Job], Job], list[Job]], Iterator[Job]]


def _prepare_anew(dataset: "Dataset", source: Source, folder: Path, each: Each, progress: Callable[[int, int], None]) -> Store:
    with _locked(folder):
        if not (folder / MANIFEST).exists():  # another process may have finished it while this one waited
            _remove_unfinished(folder)
            results = _write_parts(PartWriter(source, folder, dataset.max_pixels), each, progress)
            bad = [(path, source.parts(PART)[result["part"]].split, reason) for result in results for path, reason in result["bad"]]
            _write_quarantine(folder, bad)
            shards = _number([Shard(**result["shard"]) for result in results if result["shard"]], folder, each)
            if not any(shard.split == "train" for shard in shards):
                raise UserError(f"{_too_many(folder, len(bad), sum(source.splits.values()), bad[0])}; no image is left for training")
            root = None if dataset.root is None else str(dataset.root)
            write_json(folder / MANIFEST, _manifest(source, root, shards, len(bad), _seen(results)))
    return Store.open(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time writes a store; the lock goes with the process, however it ends."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: two runs would write the same bytes
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unfinished(folder: Path) -> None:
    for file in folder.iterdir():
        if SHARD_NAME.match(file.name) or file.name == QUARANTINE or file.suffix == ".tmp":
            file.unlink()


def _each(on_ray: bool, work: Callable[[Job], Job], jobs: list[Job]) -> Iterator[Job]:
    """The results of `work`, in any order.

    Raises:
        UserError: storage that a job could not write.
    """
    with contextlib.closing(_on_ray(work, jobs) if on_ray else (work(job) for job in jobs)) as results:  # an error ends the Ray job at once
        for result in results:
            if "error" in result:
                raise UserError(result["error"])
            yield result


def _on_ray(work: Callable[[Job], Job], jobs: list[Job]) -> Generator[Job, None, None]:
    """A Ray Data job: one task per job, results as they come."""
    import ray

    if not jobs:
        return
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars, context.print_on_execution_start = False, False
    try:
        rows = ray.data.from_items([{"job": json.dumps(job)} for job in jobs], override_num_blocks=len(jobs))
        # Ray Data repeats a crashing task for ever unless told otherwise
        done = rows.map_batches(_Task(work), batch_size=1, num_cpus=0.5, max_retries=2)
        for row in done.iter_rows():
            yield json.loads(row["result"])
    except ray.exceptions.RayError as error:
        raise StageFailed(f"prepare: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before


@dataclass(frozen=True)
class _Task:
    """`work` in the terms of Ray Data."""

    work: Callable[[Job], Job]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self.work(json.loads(job))) for job in batch["job"]]}


@dataclass(frozen=True)
class PartWriter:
    """Job: read one part of the source, decode its images, write the good ones as a shard."""

    source: Source
    folder: Path
    max_pixels: int

    def __call__(self, job: Job) -> Job:
        """{part} -> {part, shard or None, bad: [[path, reason]], sizes: [[width, height]], modes} or {error}."""
        part = self.source.parts(PART)[job["part"]]
        result: Job = {"part": job["part"], "bad": [], "sizes": [], "modes": {}}
        offset = 0 if part.split == "train" else self.source.splits["train"]
        shard = Shard(f"{part.split}-{part.start // PART:05d}.parquet", part.split, offset + part.start, 0, (), 0, "")
        try:
            written = write_shard(self.folder, shard, self._good(part, result))
        except OSError as error:
            return {"error": _storage_problem(self.folder / shard.file, error)}
        return {**result, "sizes": _extremes(result["sizes"]), "shard": written and asdict(written)}

    def _good(self, part: Any, result: Job) -> Iterator[Row]:
        """The rows that can be decoded; the others, and what was seen, go to `result`."""
        modes: Counter[str] = Counter()
        for record in self.source.read(part):
            try:
                if record.data is None:
                    raise BadImage(record.reason)
                image = open_rgb(record.data, self.max_pixels)
            except BadImage as error:
                result["bad"].append([record.path, " ".join(str(error).split())])
                continue
            modes[str(image.info["mode"])] += 1
            result["sizes"].append(image.size)
            yield record.data, record.label, record.path
        result["modes"] = dict(modes)


@dataclass(frozen=True)
class Renumber:
    """Job: write a shard again with other ids."""

    folder: Path

    def __call__(self, job: Job) -> Job:
        """A shard with its new `first_id` -> {shard} or {error}."""
        shard = Shard(**job)
        try:
            written = write_shard(self.folder, shard, read_rows(self.folder / shard.file))
        except OSError as error:
            return {"error": _storage_problem(self.folder / shard.file, error)}
        return {"shard": written and asdict(written)}


def _write_parts(work: PartWriter, each: Each, progress: Callable[[int, int], None]) -> list[Job]:
    """The results of all parts, in source order."""
    parts, done = work.source.parts(PART), 0
    results = []
    for result in each(work, [{"part": k} for k in range(len(parts))]):
        results.append(result)
        done += parts[result["part"]].count
        progress(done, sum(work.source.splits.values()))
    return sorted(results, key=lambda result: int(result["part"]))


def _number(shards: list[Shard], folder: Path, each: Each) -> list[Shard]:
    """The shards with ids 0..n-1 without gaps; those behind a bad image are written again."""
    firsts = np.cumsum([0, *(shard.count for shard in shards)]).tolist()
    moved = [replace(shard, first_id=first) for shard, first in zip(shards, firsts, strict=False) if shard.first_id != first]
    anew = {result["shard"]["file"]: Shard(**result["shard"]) for result in each(Renumber(folder), [asdict(shard) for shard in moved])}
    return [anew.get(shard.file, shard) for shard in shards]


def _write_quarantine(folder: Path, bad: list[tuple[str, str, str]]) -> None:
    columns = [pa.array([row[k] for row in bad], pa.string()) for k in range(3)]
    temporary = temporary_in(folder)
    pq.write_table(pa.table(columns, schema=QUARANTINE_SCHEMA), temporary)
    put_in_place(temporary, folder / QUARANTINE)


def _manifest(source: Source, root: str | None, shards: list[Shard], bad: int, seen: Job) -> dict[str, Any]:
    splits: dict[str, dict[str, int]] = {}
    for shard in shards:
        splits.setdefault(shard.split, {"first_id": shard.first_id, "count": 0})["count"] += shard.count
    raw = {
        "format": FORMAT,
        "source": {"kind": source.kind, "root": root, "fingerprint": source.fingerprint},
        "classes": list(source.classes),
        "splits": splits,
        "shards": [asdict(shard) for shard in shards],
        "quarantined": bad,
        "images": seen,
    }
    return {**raw, "hash": manifest_hash(raw)}


def _extremes(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """[[smallest width, smallest height], [largest width, largest height]], [] of none."""
    return [np.min(sizes, axis=0).tolist(), np.max(sizes, axis=0).tolist()] if sizes else []


def _seen(results: list[Job]) -> Job:
    """What the images are like: pixels from the smallest to the largest, and how many were of each of Pillow's modes."""
    low, high = _extremes([size for result in results for size in result["sizes"]])
    modes: Counter[str] = sum((Counter(result["modes"]) for result in results), Counter())
    return {"width": [low[0], high[0]], "height": [low[1], high[1]], "modes": dict(sorted(modes.items()))}


def _check_bad(dataset: "Dataset", store: Store) -> None:
    total = store.quarantined + sum(split.count for split in store.splits.values())
    if store.quarantined > dataset.max_bad_fraction * total:
        first = _first_quarantined(store.path)
        limit = f"dataset.max_bad_fraction: {dataset.max_bad_fraction:g} is exceeded"
        raise UserError(f"{limit}: {_too_many(store.path, store.quarantined, total, first)}; mend them, or raise the limit to go on without them")


def _first_quarantined(folder: Path) -> tuple[str, str, str]:
    try:
        row = pq.read_table(folder / QUARANTINE).slice(0, 1).to_pylist()[0]
        return row["path"], row["split"], row["reason"]
    except (*DAMAGE, IndexError) as error:
        raise UserError(f"{folder / QUARANTINE}: is missing or damaged: {type(error).__name__}; {repair(folder)}") from None


def _too_many(folder: Path, bad: int, total: int, first: tuple[str, str, str]) -> str:
    return f"{bad} of {total} images cannot be decoded, e.g. {' '.join(first[0].split())}: {first[2]}; all are listed in {folder / QUARANTINE}"


def _storage_problem(path: Path, error: OSError) -> str:
    where = error.filename if error.filename and Path(os.fsdecode(error.filename)).suffix != ".tmp" else path
    return f"{where}: cannot be written: {error.strerror or ' '.join(str(error).split())}"
