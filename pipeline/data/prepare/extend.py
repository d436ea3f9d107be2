"""Extends a store: earlier images keep their ids, splits and labels, and new images of the source get the next ids.

An image of the source is one of the earlier store if both its path and its bytes are equal. To find out, the source is
read in parts, but not decoded. The new images are a smaller source, which becomes shards like any other. The shards of
the earlier store are hard-linked as they are.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.image_statistics import ImageStatistics, SourceStatistics
from firstlight.pipeline.data.images.colours import ColourSums
from firstlight.pipeline.data.manifest import MANIFEST_FILE, Shard, advise_repair, file_sha256
from firstlight.pipeline.data.parquet import open_parquet_file
from firstlight.pipeline.data.prepare.extend_checks import (
    NEW_STORE_ADVICE,
    MatchResult,
    check_unchanged,
    hash_annotation,
)
from firstlight.pipeline.data.prepare.jobs import (
    MADE_BY,
    JobRunner,
    PrepareJob,
    describe_storage_error,
    read_finished_record,
    record_path,
    write_record,
)
from firstlight.pipeline.data.shards import short_digest
from firstlight.pipeline.data.sources import Record, Source, SourcePart
from firstlight.pipeline.data.sources.conventions.split_names import SPLITS
from firstlight.pipeline.data.sources.source_splits import hash_rank, select_lowest
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_path

# Known keys: (2, n) uint64 hashes of path and bytes of the earlier images, sorted. Tasks map the file and search in it.
KNOWN_FILE = "known.npy"
# No earlier image has this path. A lower value -2 - k means: the path of the k-th known key, with other bytes.
NEW_IMAGE = -1


def open_earlier_store(extends: str) -> Store:
    """Returns the store in the folder `dataset.extends`, not verified.

    Raises:
        UserError: the store does not exist or is damaged.
    """
    path = Path(extends)
    if not is_store(extends):
        raise UserError(f"dataset.extends: {extends!r} has no {MANIFEST_FILE}; valid: the folder of a finished store")
    with blame_extends(path):
        return Store.open(path)


def is_store(folder: str) -> bool:
    """Returns True if `folder` has the manifest of a store. Any text is a valid argument."""
    # `pathlib` raises for some texts that cannot be a path; `os.path` does not.
    return os.path.isfile(os.path.join(folder, MANIFEST_FILE))


@contextlib.contextmanager
def blame_extends(path: Path) -> Iterator[None]:
    """Rewrites an error about damage of the earlier store as one about `dataset.extends`.

    The usual repair does not apply: with these options `prepare` would not write the earlier store.
    """
    try:
        yield
    except UserError as error:
        problem = str(error).removesuffix("; " + advise_repair(path))
        raise UserError(f"dataset.extends: {problem}; restore that store, {NEW_STORE_ADVICE}") from None


@dataclass(frozen=True)
class Matcher:
    """Job that reads a part of the source and looks up its images among the known keys.

    A part that is finished already is not read again.
    """

    source: Source
    folder: Path
    split_seed: int

    def __call__(self, job: PrepareJob) -> PrepareJob:
        """Maps {split, start, count, file} to {job, found, ranks, annotated} or {error}.

        found: for each image its index among the known keys, or a value as `NEW_IMAGE` describes; ranks: of the images
        that are not found; annotated: `hash_annotation` of each image.
        """
        file = self.folder / job["file"]
        try:
            return read_finished_record(file, job) or self._match(job)
        except OSError as error:
            return {"error": describe_storage_error(record_path(file), error)}

    def _match(self, job: PrepareJob) -> PrepareJob:
        known = np.asarray(np.load(self.folder / KNOWN_FILE, mmap_mode="r"))
        keys, paths, annotated = [], [], []
        for image in self.source.read(SourcePart(job["split"], job["start"], job["count"])):
            keys.append((short_digest(image.path.encode()), _hash_bytes(image)))
            paths.append(image.path)
            annotated.append(hash_annotation(image, self.source.annotations))
        found = _look_up(known, keys)
        ranks = [
            hash_rank(self.split_seed, path.encode()) for path, index in zip(paths, found, strict=True) if index < 0
        ]
        record = {"job": job, "made_by": MADE_BY, "shard": None, "found": found, "ranks": ranks, "annotated": annotated}
        # A changed image ends the run. Without a record, the part is read again after the user has repaired the source.
        if min(found) >= NEW_IMAGE:
            write_record(self.folder / job["file"], record)
        return record


def _hash_bytes(image: Record) -> int | None:
    return None if image.data is None else short_digest(image.data)


def _look_up(known: np.ndarray, keys: list[tuple[int, int | None]]) -> list[int]:
    """Returns the first index in `known` of each (path hash, bytes hash), or a value as `NEW_IMAGE` describes."""
    wanted = np.array([path for path, _ in keys], np.uint64)
    starts, stops = (np.searchsorted(known[0], wanted, side=side).tolist() for side in ("left", "right"))
    found = []
    for start, stop, (_, content) in zip(starts, stops, keys, strict=True):
        indices = [k for k in range(start, stop) if int(known[1, k]) == content]
        found.append(indices[0] if indices else -2 - start if start < stop else NEW_IMAGE)
    return found


def list_match_jobs(source: Source, rows: int) -> list[PrepareJob]:
    """Returns a job for `Matcher` per part of `rows` images, in source order."""
    return [
        {**asdict(part), "file": f"match-{part.split}-{part.start // rows:05d}.json"}
        for part in source.split_into_parts(rows)
    ]


def select_new_images(
    old: Store,
    matcher: Matcher,
    jobs: list[PrepareJob],
    run_jobs: JobRunner,
    progress: Callable[[int, int], None],
    *,
    test_fraction: float,
) -> Source:
    """Returns the source of `matcher`, whose classes are aligned, without the images of `old`.

    If the source has no test split, `test_fraction` of the new images becomes one.

    Raises:
        UserError: an image of `old` is missing or changed, see `check_unchanged`.
    """
    source = matcher.source
    found = _match_images(old, matcher, jobs, run_jobs, progress)
    labels = source.labels[found.rows]
    check_unchanged(old, found, labels, source.classes, tuple(source.rows))
    new, splits = found.ids < 0, found.splits.copy()
    if "test" not in source.rows:
        drawn_from = new & (splits == "train")
        splits[drawn_from] = np.where(
            select_lowest(found.ranks[drawn_from], labels[drawn_from], test_fraction), "test", "train"
        )
    parts = {split: found.rows[new & (splits == split)] for split in SPLITS}
    return replace(source, rows={split: np.sort(rows) for split, rows in parts.items() if len(rows)})


def align_classes(old: Store, source: Source) -> Source:
    """Returns `source` with the classes of `old` under their numbers, followed by its new classes in its order."""
    old_names = set(old.classes)
    classes = (*old.classes, *(name for name in source.classes if name not in old_names))
    index = {name: k for k, name in enumerate(classes)}
    # The last number is that of label -1.
    numbers = np.array([*(index[name] for name in source.classes), -1], np.int64)
    return replace(source, classes=classes, labels=numbers[source.labels])


def _match_images(
    old: Store,
    matcher: Matcher,
    jobs: list[PrepareJob],
    run_jobs: JobRunner,
    progress: Callable[[int, int], None],
) -> MatchResult:
    """Runs the jobs and collects their results, which may come in any order.

    Memory: about 48 bytes per image of the source, and as many per image of `old`.
    """
    source, order = matcher.source, _write_known_keys(old, matcher.folder)
    ends = np.cumsum([job["count"] for job in jobs]).tolist()
    end_of, total = {job["file"]: end for job, end in zip(jobs, ends, strict=True)}, ends[-1]
    found, ranks, annotated, done = np.empty(total, np.int64), np.zeros(total, np.uint64), np.zeros(total, np.uint64), 0
    for result in run_jobs(matcher, jobs):
        count, end = result["job"]["count"], end_of[result["job"]["file"]]
        part = slice(end - count, end)
        found[part] = result["found"]
        ranks[part][found[part] < 0] = np.array(result["ranks"], np.uint64)
        annotated[part] = np.array(result["annotated"], np.uint64)
        done += count
        progress(done, total)
    known = np.asarray(np.load(matcher.folder / KNOWN_FILE, mmap_mode="r"))
    return MatchResult(
        rows=np.concatenate([*source.rows.values()]),
        splits=np.repeat([*source.rows], [*source.splits.values()]).astype(f"U{max(map(len, SPLITS))}"),
        ids=_assign_ids(known, order, found),
        changed_ids=order[-2 - found[found < NEW_IMAGE]],
        ranks=ranks,
        annotated=annotated,
    )


def _write_known_keys(old: Store, folder: Path) -> np.ndarray:
    """Writes the known keys of `old` into `folder`. Returns the id (n,) of each of them."""
    keys = np.concatenate([_hash_shard_rows(old.path / shard.file) for shard in old.shards], axis=1)
    # The sort is stable: images with equal path and bytes stay in the order of their ids.
    order = np.lexsort((keys[1], keys[0]))
    with atomic_path(folder / KNOWN_FILE) as temporary, temporary.open("wb") as file:
        np.save(file, keys[:, order])
    return order


def _hash_shard_rows(file: Path) -> np.ndarray:
    """Returns (2, rows) uint64 hashes of path and bytes of the images of a shard."""
    with open_parquet_file(file) as opened:
        table = opened.read(columns=["path", "digest"], use_threads=False)
    paths = [short_digest(path.encode()) for path in table["path"].to_pylist()]
    return np.stack([np.array(paths, np.uint64), table["digest"].to_numpy()])


def _assign_ids(known: np.ndarray, order: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Returns the id (n,) of each image of the source in the earlier store; -1 if it is new.

    The k-th of equal images in the source is the k-th in the store; surplus ones are new.
    """
    ids = np.full(len(found), -1, np.int64)
    rows = np.argsort(found, kind="stable")[np.count_nonzero(found < 0) :]
    indices = found[rows]
    copies = np.arange(len(indices)) - np.searchsorted(indices, indices)
    exists = indices + copies < len(order)
    rows, indices, copies = rows[exists], indices[exists], copies[exists]
    same = (known[:, indices] == known[:, indices + copies]).all(axis=0)
    ids[rows[same]] = order[indices[same] + copies[same]]
    return ids


def append_jobs(old_shards: Sequence[Shard], jobs: list[PrepareJob]) -> list[PrepareJob]:
    """Returns `jobs` with ids and file names that follow those of the shards `old_shards`."""
    first_number, num_old = Counter[str](), sum(shard.count for shard in old_shards)
    for shard in old_shards:
        first_number[shard.split] = max(first_number[shard.split], 1 + _parse_shard_number(shard.file))
    numbers = [first_number[job["split"]] + _parse_shard_number(job["file"]) for job in jobs]
    return [
        {**job, "file": f"{job['split']}-{number:05d}.parquet", "first_id": num_old + job["first_id"]}
        for job, number in zip(jobs, numbers, strict=True)
    ]


def _parse_shard_number(file: str) -> int:
    return int(file.removesuffix(".parquet").rpartition("-")[2])


def link_shards(old: Store, folder: Path) -> None:
    """Hard-links the shards of `old` into `folder`, or copies them to another file system."""
    for shard in old.shards:
        if not _has_shard(old.path / shard.file, folder / shard.file, shard):
            with atomic_path(folder / shard.file) as temporary:
                _link_or_copy(old.path / shard.file, temporary)


def _has_shard(source: Path, file: Path, shard: Shard) -> bool:
    return file.exists() and (file.samefile(source) or file_sha256(file) == shard.sha256)


def _link_or_copy(source: Path, file: Path) -> None:
    try:
        os.link(source, file)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, file)


def load_statistics(old: Store) -> SourceStatistics:
    """Returns the statistics of the images of `old`, to which those of new images can be added."""
    statistics = SourceStatistics()
    # The images that were quarantined then are read again, as they are in no store.
    statistics.whole.merge({**old.images, "labels": [], "annotated": [], "refused": {}})
    colours = ColourSums()
    # The store of an earlier version has none.
    colours.merge_sums(old.images.get("colours", colours.dump_sums()))
    for split in old.splits:
        kinds = old.images.get("annotated", {}).get(split, {})
        annotated = Counter({(kind, int(c)): n for kind, counts in kinds.items() for c, n in counts.items()})
        labels = Counter(old.labels(split).tolist())
        statistics.splits[split] = ImageStatistics(labels=labels, annotated=annotated)
        if split == "train":
            statistics.splits[split].colours = colours
    return statistics
