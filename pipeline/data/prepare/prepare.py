"""Stage: any source of images -> a store. Every image is decoded once; what cannot be decoded is listed, never silently dropped.

The images are numbered 0..n-1 over the good ones, in source order, whoever reads them: shards are written side by side as if no image were
bad, and those behind a bad one are numbered again afterwards. Killed and started again, it goes on with the parts that are not done.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.duplicates import write_duplicates
from firstlight.pipeline.data.image_statistics import Total
from firstlight.pipeline.data.parquet import parquet_table
from firstlight.pipeline.data.prepare.extend import (
    KNOWN,
    Matcher,
    behind,
    census_of,
    earlier_store,
    is_store,
    match_jobs,
    naming_extends,
    new_images,
    renumbered,
    take_over,
)
from firstlight.pipeline.data.prepare.extend_checks import check_same_kind
from firstlight.pipeline.data.prepare.jobs import (
    Each,
    Job,
    PartWriter,
    Renumber,
    gaps,
    jobs,
    quarantined,
    storage_problem,
)
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.data.store import (
    DAMAGE,
    FORMAT,
    MANIFEST,
    QUARANTINE,
    SHARD_NAME,
    Earlier,
    Shard,
    Store,
    canonical,
    manifest_hash,
    repair,
)
from firstlight.pipeline.data.subsets import write_subsets
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.files import atomic_path, write_json

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no decoding task needs
    )

PART = 2048  # images of the source per task and shard
# Fields of the dataset that change the store
DECIDING = (
    "source",
    "image_column",
    "path_column",
    "label_column",
    "split_column",
    "test_fraction",
    "split_seed",
    "max_pixels",
)
NONE = np.empty(0, np.int64)
QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("split", pa.string()), ("reason", pa.string())])


def prepare(
    dataset: "Dataset", stores: Path, on_ray: Callable[[], bool], progress: Callable[[int, int], None]
) -> Store:
    """The store of `dataset` below `stores`: the finished one if it is there and whole, else written, or written to its end.

    `on_ray` is asked when there is something to write: whether Ray (started by then) does it, or this process. On Ray, `stores` must be storage
    that all nodes share. `progress(done, total)` is called with numbers of images: of the source, or of the store that is verified.

    Raises:
        UserError: the source, as `open_source`; too many bad images; a damaged store; storage that cannot be written; an earlier store whose
            images are not all in the source, as they were.
    """
    # What is carved out of an extended source is carved out of its new images
    source = open_source(dataset if dataset.extends is None else dataset.model_copy(update={"test_fraction": 0.0}))
    target = _target(dataset, source, stores)
    try:
        if (target.folder / MANIFEST).exists():
            store = Store.open(target.folder)
            store.verify(progress)
            _remove_records(target.folder)  # those of a process that was killed after its last file
        else:
            target.check(source, progress)
            store = _prepare_anew(dataset, source, target, functools.partial(_each, on_ray()), progress)
    except OSError as error:
        raise UserError(storage_problem(target.folder, error)) from None
    _check_bad(dataset, store)
    return store


@dataclass(frozen=True)
class Target:
    """The folder of the store to be, and the store that it extends."""

    folder: Path
    old: Store | None = None

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.old.shards if self.old else ()

    def check(self, source: Source, progress: Callable[[int, int], None]) -> None:
        """All that can be known of `old` before Ray starts."""
        if self.old:
            check_same_kind(self.old, source)
            with naming_extends(self.old.path):
                self.old.verify(progress)


def _target(dataset: "Dataset", source: Source, stores: Path) -> Target:
    """When an extended store is finished, the one that it extends may be gone."""
    if dataset.extends is None:
        return Target(_folder(dataset, source, stores))
    if not is_store(dataset.extends):
        for manifest in sorted(stores.glob(f"{dataset.name}-*/{MANIFEST}")):
            with contextlib.suppress(UserError):
                for earlier in Store.open(manifest.parent).extends[-1:]:
                    there = _folder(dataset, source, stores, extends=earlier.hash)
                    if (earlier.name, there) == (Path(dataset.extends).name, manifest.parent):
                        return Target(there)
    old = earlier_store(dataset.extends)
    return Target(_folder(dataset, source, stores, extends=old.hash), old)


def _folder(dataset: "Dataset", source: Source, stores: Path, **extends: str) -> Path:
    fields = {**{name: getattr(dataset, name) for name in DECIDING}, **extends}
    digest = hashlib.sha256(canonical({**fields, "fingerprint": source.fingerprint, "format": FORMAT})).hexdigest()
    return stores / f"{dataset.name}-{digest[:12]}"


def _prepare_anew(
    dataset: "Dataset", source: Source, target: Target, each: Each, progress: Callable[[int, int], None]
) -> Store:
    folder, old = target.folder, target.old
    with _locked(folder):
        if not (folder / MANIFEST).exists():  # another process may have finished it while this one waited
            if old:
                work = Matcher(renumbered(old, source), folder, dataset.split_seed)
                source = new_images(
                    old, work, match_jobs(source, PART), each, progress, test_fraction=dataset.test_fraction
                )
                take_over(old, folder)
            todo = behind(target.shards, jobs(source, PART))
            _remove_foreign(folder, {shard.file for shard in target.shards} | {job["file"] for job in todo})
            results, seen = _write_parts(PartWriter(source, folder, dataset.max_pixels), todo, old, each, progress)
            _write_quarantine(folder, results)
            shards = _number(results, target.shards, folder, each)
            bad = sum(result["quarantined"] for result in results)
            if not any(shard.split == "train" for shard in shards):
                problem = _too_many(folder, bad, sum(source.splits.values()), _first_quarantined(folder))
                raise UserError(f"{problem}; no image is left for training")
            facts = {"bad": bad, "root": None if dataset.root is None else str(dataset.root)}
            images = {**seen.dump(), "duplicates": write_duplicates(folder, shards)}
            before = {name: old.subset(name) for name in old.subset_names} if old else {}
            subsets = write_subsets(
                folder,
                source.subsets,
                source.rows.get("train", NONE),
                _train_ids(source, results, shards, folder),
                before,
            )
            write_json(
                folder / MANIFEST, _manifest(source, old, shards, {"images": images, "subsets": subsets}, **facts)
            )
    _remove_records(folder)
    return Store.open(folder)


def _remove_records(folder: Path) -> None:
    """Of a finished store, whose manifest says it all."""
    for file in (*folder.glob("*-*.json"), *folder.glob(KNOWN)):
        with contextlib.suppress(OSError):  # storage that is read only: they do no harm
            file.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time writes a store; the lock goes with the process, however it ends."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: two runs would write the same bytes
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_foreign(folder: Path, mine: set[str]) -> None:
    """What a killed process did not finish, and shards that are not of this source."""
    for file in folder.iterdir():
        if file.suffix == ".tmp" or (SHARD_NAME.match(file.name) and file.name not in mine):
            file.unlink()


def _each(on_ray: bool, work: Callable[[Job], Job], jobs: list[Job]) -> Iterator[Job]:
    """The results of `work`, in any order.

    Raises:
        UserError: storage that a job could not write.
    """
    with contextlib.closing(
        _on_ray(work, jobs) if on_ray else (work(job) for job in jobs)
    ) as results:  # an error ends the Ray job at once
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
        done = rows.map_batches_internal(_Task(work), batch_size=1, num_cpus=0.5, max_retries=2)
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


def _write_parts(
    work: PartWriter, todo: list[Job], old: Store | None, each: Each, progress: Callable[[int, int], None]
) -> tuple[list[Job], Total]:
    """The results of all parts, in source order, and what the images are like, with those of `old`."""
    results, seen = {}, census_of(old) if old else Total()
    done = before = old.edges[-1] if old else 0
    for result in each(work, todo):
        seen.add(
            result["job"]["split"], result.pop("census")
        )  # as they come: kept, a thousand classes of each part would add up
        results[result["job"]["file"]] = result
        done += result["job"]["count"]
        progress(done, before + sum(work.source.splits.values()))
    return [results[job["file"]] for job in todo], seen


def _number(results: list[Job], before: tuple[Shard, ...], folder: Path, each: Each) -> list[Shard]:
    """All shards, with ids 0..n-1 without gaps; those behind a bad image are written again, unless they were already."""
    shards = [*before, *(Shard(**result["shard"]) for result in results if result["shard"])]
    firsts = np.cumsum([0, *(shard.count for shard in shards)]).tolist()
    moved = [
        {"file": shard.file, "first_id": first}
        for shard, first in zip(shards, firsts, strict=False)
        if shard.first_id != first
    ]
    anew = {result["shard"]["file"]: Shard(**result["shard"]) for result in each(Renumber(folder), moved)}
    return [anew.get(shard.file, shard) for shard in shards]


def _write_quarantine(folder: Path, results: list[Job]) -> None:
    """Path, split and reason of the images without an id: it is the good ones that are numbered. One part at a time."""
    with atomic_path(folder / QUARANTINE) as temporary, pq.ParquetWriter(temporary, QUARANTINE_SCHEMA) as writer:
        for job in (result["job"] for result in results if result["quarantined"]):
            paths, reasons = zip(*quarantined(folder, job), strict=True)
            writer.write_table(pa.table([paths, [job["split"]] * len(paths), reasons], schema=QUARANTINE_SCHEMA))


def _train_ids(source: Source, results: list[Job], shards: list[Shard], folder: Path) -> np.ndarray:
    """(images of the training split,) int64: the id of each, -1 = it cannot be decoded."""
    if not source.subsets:
        return NONE
    ids, firsts = np.full(source.splits.get("train", 0), -1, np.int64), {shard.file: shard.first_id for shard in shards}
    for job in (result["job"] for result in results if result["shard"] and result["job"]["split"] == "train"):
        places = np.delete(np.arange(job["start"], job["start"] + job["count"]), gaps(folder, job))
        ids[places] = firsts[job["file"]] + np.arange(len(places))
    return ids


def _manifest(
    source: Source, old: Store | None, shards: list[Shard], found: Job, *, bad: int, root: str | None
) -> dict[str, Any]:
    splits = Counter[str]()
    for shard in shards:
        splits[shard.split] += shard.count
    extends = (*old.extends, Earlier(old.path.resolve().name, old.hash, old.edges[-1])) if old else ()
    raw = {
        "format": FORMAT,
        "source": {
            "kind": source.kind,
            "root": root,
            "fingerprint": source.fingerprint,
            **({"aside": source.aside} if source.aside else {}),
        },
        "extends": [asdict(earlier) for earlier in extends],
        "classes": list(source.classes),
        "splits": dict(splits),
        "shards": [asdict(shard) for shard in shards],
        "quarantined": bad,
        "annotations": list(source.annotations),
        **found,
    }
    return {**raw, "hash": manifest_hash(raw)}


def _check_bad(dataset: "Dataset", store: Store) -> None:
    total = store.quarantined + sum(store.splits.values())
    if store.quarantined > dataset.max_bad_fraction * total:
        first = _first_quarantined(store.path)
        limit = f"dataset.max_bad_fraction: {dataset.max_bad_fraction:g} is exceeded"
        raise UserError(
            f"{limit}: {_too_many(store.path, store.quarantined, total, first)}; mend them, or raise the limit to go on without them"
        )


def _first_quarantined(folder: Path) -> tuple[str, str, str]:
    try:
        row = parquet_table(folder / QUARANTINE).slice(0, 1).to_pylist()[0]
        return row["path"], row["split"], row["reason"]
    except (*DAMAGE, IndexError) as error:
        raise UserError(
            f"{folder / QUARANTINE}: is missing or damaged: {type(error).__name__}; {repair(folder)}"
        ) from None


def _too_many(folder: Path, bad: int, total: int, first: tuple[str, str, str]) -> str:
    return f"{bad} of {total} images cannot be decoded, e.g. {' '.join(first[0].split())}: {first[2]}; all are listed in {folder / QUARANTINE}"
