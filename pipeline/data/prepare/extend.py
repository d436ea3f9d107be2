"""A store that grows: the images of an earlier one keep their ids, splits and labels, and what is new in the source comes behind them.

An image of the source is one of the earlier store if it has its path and its bytes. The source is read in parts to find out, not decoded;
what is left is a smaller source, which becomes shards as any other. The shards of the earlier store are taken over as they are, by hard links.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.image_statistics import Census, Total
from firstlight.pipeline.data.parquet import parquet_file
from firstlight.pipeline.data.prepare.extend_checks import ANEW, Found, annotation_key, check_unchanged
from firstlight.pipeline.data.prepare.jobs import MADE_BY, Each, Job, finished, record_of, storage_problem, write_record
from firstlight.pipeline.data.shards import digest
from firstlight.pipeline.data.sources import Part, Record, Source
from firstlight.pipeline.data.sources.source import lowest, rank
from firstlight.pipeline.data.store import MANIFEST, Shard, Store, file_sha256, repair
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_path

KNOWN = "known.npy"  # (2, n) uint64, hashes of the path and of the bytes of the earlier images; sorted: tasks map it, and search
NEW = -1  # no earlier image has this path; any number below it: -2 - k, the path of the k-th of KNOWN with other bytes


def earlier_store(extends: str) -> Store:
    """The store in the folder `dataset.extends`, not verified.

    Raises:
        UserError: it is not there, or not whole.
    """
    path = Path(extends)
    if not is_store(extends):
        raise UserError(f"dataset.extends: {extends!r} has no {MANIFEST}; valid: the folder of a finished store")
    with naming_extends(path):
        return Store.open(path)


def is_store(folder: str) -> bool:
    """Whether it has the manifest of one."""
    return os.path.isfile(
        os.path.join(folder, MANIFEST)
    )  # False, too, for what can be no path: pathlib raises over some


@contextlib.contextmanager
def naming_extends(path: Path) -> Iterator[None]:
    """A damage of the earlier store as a mistake in `dataset.extends`: prepare as it is set now could not write it anew."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"dataset.extends: {str(error).removesuffix('; ' + repair(path))}; bring that store back, {ANEW}"
        ) from None


@dataclass(frozen=True)
class Matcher:
    """Job: read one part of the source and look its images up in KNOWN; nothing of it, where that was done before."""

    source: Source
    folder: Path
    split_seed: int

    def __call__(self, job: Job) -> Job:
        """{split, start, count, file} -> {job, found: for each image its place in KNOWN, or as NEW, ranks: of the new ones, annotated: for each image
        as `annotation_key`} or {error}.
        """
        file = self.folder / job["file"]
        try:
            return finished(file, job) or self._match(job)
        except OSError as error:
            return {"error": storage_problem(record_of(file), error)}

    def _match(self, job: Job) -> Job:
        known = np.asarray(np.load(self.folder / KNOWN, mmap_mode="r"))
        keys, paths, annotated = [], [], []
        for image in self.source.read(Part(job["split"], job["start"], job["count"])):
            keys.append((digest(image.path.encode()), _bytes_of(image)))
            paths.append(image.path)
            annotated.append(annotation_key(image, self.source.annotations))
        found = _look_up(known, keys)
        ranks = [rank(self.split_seed, path.encode()) for path, place in zip(paths, found, strict=True) if place < 0]
        record = {"job": job, "made_by": MADE_BY, "shard": None, "found": found, "ranks": ranks, "annotated": annotated}
        if min(found) >= NEW:  # else it ends the run, and what is mended by then must be read again
            write_record(self.folder / job["file"], record)
        return record


def _bytes_of(image: Record) -> int | None:
    return None if image.data is None else digest(image.data)


def _look_up(known: np.ndarray, keys: list[tuple[int, int | None]]) -> list[int]:
    """The first place in `known` of each (hash of the path, hash of the bytes), or NEW, or as NEW says."""
    wanted = np.array([path for path, _ in keys], np.uint64)
    starts, stops = (np.searchsorted(known[0], wanted, side=side).tolist() for side in ("left", "right"))
    found = []
    for start, stop, (_, content) in zip(starts, stops, keys, strict=True):
        places = [k for k in range(start, stop) if int(known[1, k]) == content]
        found.append(places[0] if places else -2 - start if start < stop else NEW)
    return found


def match_jobs(source: Source, rows: int) -> list[Job]:
    """A job for `Matcher` per part of `rows` images, in source order."""
    return [
        {**asdict(part), "file": f"match-{part.split}-{part.start // rows:05d}.json"} for part in source.parts(rows)
    ]


def new_images(
    old: Store,
    work: Matcher,
    todo: list[Job],
    each: Each,
    progress: Callable[[int, int], None],
    *,
    test_fraction: float,
) -> Source:
    """The source of `work`, which is `renumbered`, without the images of `old`. `test_fraction`: of the new ones, if it has no test split.

    Raises:
        UserError: as `check_unchanged`.
    """
    source = work.source
    found = _found(old, work, todo, each, progress)
    labels, stated = source.labels[found.places], "test" in source.rows
    check_unchanged(old, found, labels, source.classes, stated)
    new = found.ids < 0
    test = found.test[new] if stated else lowest(found.ranks[new], labels[new], test_fraction)
    parts = {"train": found.places[new][~test], "test": found.places[new][test]}
    return replace(source, rows={split: np.sort(places) for split, places in parts.items() if len(places)})


def renumbered(old: Store, source: Source) -> Source:
    """The classes of `old` keep their numbers; new ones come behind them, in the order of the source."""
    there = set(old.classes)
    classes = (*old.classes, *(name for name in source.classes if name not in there))
    index = {name: k for k, name in enumerate(classes)}
    numbers = np.array([*(index[name] for name in source.classes), -1], np.int64)  # the last is that of label -1
    return replace(source, classes=classes, labels=numbers[source.labels])


def _found(old: Store, work: Matcher, todo: list[Job], each: Each, progress: Callable[[int, int], None]) -> Found:
    """What the jobs tell, whatever their order. About 48 bytes per image of the source, and as many per image of `old`, are all that is kept."""
    source, order = work.source, _write_known(old, work.folder)
    ends = np.cumsum([job["count"] for job in todo]).tolist()
    end_of, total = {job["file"]: end for job, end in zip(todo, ends, strict=True)}, ends[-1]
    found, ranks, annotated, done = np.empty(total, np.int64), np.zeros(total, np.uint64), np.zeros(total, np.uint64), 0
    for result in each(work, todo):
        count, end = result["job"]["count"], end_of[result["job"]["file"]]
        here = slice(end - count, end)
        found[here] = result["found"]
        ranks[here][found[here] < 0] = np.array(result["ranks"], np.uint64)
        annotated[here] = np.array(result["annotated"], np.uint64)
        done += count
        progress(done, total)
    known = np.asarray(np.load(work.folder / KNOWN, mmap_mode="r"))
    test = np.repeat([split == "test" for split in source.rows], [*source.splits.values()])
    differ = order[-2 - found[found < NEW]]
    return Found(np.concatenate([*source.rows.values()]), test, _ids(known, order, found), differ, ranks, annotated)


def _write_known(old: Store, folder: Path) -> np.ndarray:
    """KNOWN in the folder, and the id (n,) of each of its places."""
    keys = np.concatenate([_keys(old.path / shard.file) for shard in old.shards], axis=1)
    order = np.lexsort((keys[1], keys[0]))  # stable: images with the same path and bytes stay in the order of their ids
    with atomic_path(folder / KNOWN) as temporary, temporary.open("wb") as file:
        np.save(file, keys[:, order])
    return order


def _keys(file: Path) -> np.ndarray:
    """(2, rows) uint64 of a shard, as KNOWN."""
    with parquet_file(file) as opened:
        table = opened.read(columns=["path", "digest"], use_threads=False)
    paths = [digest(path.encode()) for path in table["path"].to_pylist()]
    return np.stack([np.array(paths, np.uint64), table["digest"].to_numpy()])


def _ids(known: np.ndarray, order: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(n,) ids, -1 = new. Of equal images, the k-th in the source is the k-th of the store; those that are more are new."""
    ids = np.full(len(found), -1, np.int64)
    rows = np.argsort(found, kind="stable")[np.count_nonzero(found < 0) :]
    places = found[rows]
    turns = np.arange(len(places)) - np.searchsorted(places, places)
    there = places + turns < len(order)
    rows, places, turns = rows[there], places[there], turns[there]
    same = (known[:, places] == known[:, places + turns]).all(axis=0)
    ids[rows[same]] = order[places[same] + turns[same]]
    return ids


def behind(before: Sequence[Shard], todo: list[Job]) -> list[Job]:
    """The jobs of a source, with ids and files that follow those of the shards `before`."""
    last, count = Counter[str](), sum(shard.count for shard in before)
    for shard in before:
        last[shard.split] = max(last[shard.split], 1 + _number(shard.file))
    numbers = [last[job["split"]] + _number(job["file"]) for job in todo]
    return [
        {**job, "file": f"{job['split']}-{number:05d}.parquet", "first_id": count + job["first_id"]}
        for job, number in zip(todo, numbers, strict=True)
    ]


def _number(file: str) -> int:
    return int(file.removesuffix(".parquet").rpartition("-")[2])


def take_over(old: Store, folder: Path) -> None:
    """The shards of `old` in the folder: the same files by another name, or copies of them on another file system."""
    for shard in old.shards:
        if not _is_there(old.path / shard.file, folder / shard.file, shard):
            with atomic_path(folder / shard.file) as temporary:
                _link(old.path / shard.file, temporary)


def _is_there(source: Path, file: Path, shard: Shard) -> bool:
    return file.exists() and (file.samefile(source) or file_sha256(file) == shard.sha256)


def _link(source: Path, file: Path) -> None:
    try:
        os.link(source, file)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, file)


def census_of(old: Store) -> Total:
    """What its images are like, to count others in."""
    seen = Total()
    seen.whole.merge({**old.images, "labels": [], "annotated": []})
    for split in old.splits:
        kinds = old.images.get("annotated", {}).get(split, {})
        annotated = Counter({(kind, int(c)): n for kind, counts in kinds.items() for c, n in counts.items()})
        seen.splits[split] = Census(labels=Counter(old.labels(split).tolist()), annotated=annotated)
    return seen
