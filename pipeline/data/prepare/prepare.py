"""Any source of images -> a store. Every image is decoded once; those that cannot be decoded are listed, not dropped.

The decodable images are numbered 0..n-1 in source order, for any number of tasks: shards are written in parallel as if
every image were good, and shards after a bad image are renumbered afterwards. A run that was killed resumes with the
parts that are not finished.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, cast

from firstlight.pipeline.data import ray_data
from firstlight.pipeline.data.image_statistics import SourceStatistics
from firstlight.pipeline.data.manifest import MANIFEST_FILE, SHARD_NAME
from firstlight.pipeline.data.mirror import jobs as mirrored_jobs
from firstlight.pipeline.data.mirror.places import fetch_unit
from firstlight.pipeline.data.prepare.assemble import assemble_store, describe_bad_images
from firstlight.pipeline.data.prepare.extend import (
    KNOWN_FILE,
    Matcher,
    align_classes,
    append_jobs,
    link_shards,
    list_match_jobs,
    load_statistics,
    select_new_images,
)
from firstlight.pipeline.data.prepare.jobs import (
    JobRunner,
    PartWriter,
    PrepareJob,
    describe_storage_error,
    list_jobs,
    record_path,
)
from firstlight.pipeline.data.prepare.local_jobs import run_on_this_machine
from firstlight.pipeline.data.prepare.mask_checks import check_masks
from firstlight.pipeline.data.prepare.target import PrepareOptions, StoreTarget, find_target
from firstlight.pipeline.data.sources import Source, SourceOptions, open_source
from firstlight.pipeline.data.sources.source_splits import DEFAULT_TEST_FRACTION
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, UserError, take_first_line
from firstlight.pipeline.files import LOCK_FILE, wait_for_lock
from firstlight.pipeline.usable_cpus import count_usable_cpus

# Number of images of the source per task and shard.
IMAGES_PER_SHARD = 2048


def prepare(
    dataset: PrepareOptions,
    stores: Path,
    on_ray: Callable[[], bool],
    progress: Callable[[int, int], None],
    tell: Callable[[Sequence[str]], None] = lambda lines: None,
    auto_side: int | None = None,
    source: Source | None = None,
    processes: int | None = None,
    is_busy: Callable[[], bool] = lambda: False,
) -> Store:
    """Returns the store of `dataset` below `stores`: a finished one is verified, otherwise it is written or resumed.

    `on_ray` is called if there is something to write; it returns True if Ray, started by then, is to write it. On Ray,
    all nodes must share the storage of `stores`. Otherwise processes of this machine write it, at most `processes` at a
    time, None for as many as there are CPUs; a source that is written in seconds needs one.

    `progress(done, total)` is called with numbers of images: of the source, or of the store that is verified.
    `tell(lines)` is called with what was read as what, before a store is written. `auto_side`: what
    `dataset.store_size: auto` stands for in a recipe, see `find_auto_side`. `source`: the listing of `dataset`, which
    extends nothing, where it is known already. `is_busy`: as `run_on_this_machine`.

    Raises:
        UserError: an error of `open_source`; too many bad images; a damaged store; storage that cannot be written; an
            earlier store with images that are missing from the source or changed.
    """
    source = source or open_source(dataset if dataset.extends is None else _without_test_fraction(dataset))
    target = find_target(dataset, source, stores, auto_side)
    if not (target.folder / MANIFEST_FILE).exists():
        tell(fetch_unit(target.folder))
    try:
        if (target.folder / MANIFEST_FILE).exists():
            store = Store.open(target.folder)
            store.verify(progress)
            # The records exist if a process was killed after it wrote the manifest.
            _remove_records(target.folder)
        else:
            tell(source.reading)
            target.check(source, progress)
            run_jobs = functools.partial(_run_jobs, on_ray(), processes or count_usable_cpus(), is_busy)
            store = _write_store(dataset, source, target, run_jobs, progress)
    except OSError as error:
        raise UserError(describe_storage_error(target.folder, error)) from None
    _check_bad_fraction(dataset, store)
    check_masks(store, dataset.mask_values)
    return store


class _ZeroTestFraction:
    """Options of a data set, except that no test split is taken from the training split."""

    test_fraction = 0.0

    def __init__(self, options: SourceOptions) -> None:
        self._options = options

    def __getattr__(self, name: str) -> Any:
        return getattr(self._options, name)


def _without_test_fraction(options: SourceOptions) -> SourceOptions:
    """Returns options for opening a source that extends a store: its test split is taken from the new images only."""
    return cast(SourceOptions, _ZeroTestFraction(options))


def _write_store(
    dataset: PrepareOptions,
    source: Source,
    target: StoreTarget,
    run_jobs: JobRunner,
    progress: Callable[[int, int], None],
) -> Store:
    folder, old = target.folder, target.old
    with _hold_lock(folder):
        # Another process may have finished the store while this one waited.
        if not (folder / MANIFEST_FILE).exists():
            if old:
                matcher = Matcher(align_classes(old, source), folder, dataset.split_seed)
                match_jobs = list_match_jobs(source, IMAGES_PER_SHARD)
                fraction = DEFAULT_TEST_FRACTION if dataset.test_fraction is None else dataset.test_fraction
                source = select_new_images(old, matcher, match_jobs, run_jobs, progress, test_fraction=fraction)
                link_shards(old, folder)
            jobs = append_jobs(target.old_shards, list_jobs(source, IMAGES_PER_SHARD))
            _remove_leftovers(folder, {shard.file for shard in target.old_shards} | {job["file"] for job in jobs})
            writer = PartWriter(source, folder, dataset.max_pixels, dataset.depth, target.side, dataset.pixels)
            results, statistics = _write_parts(writer, jobs, old, run_jobs, progress)
            root = None if dataset.root is None else str(dataset.root)
            assemble_store(
                folder,
                source,
                old,
                results,
                statistics,
                run_jobs,
                root=root,
                depth=dataset.depth,
                side=target.side,
            )
    _remove_records(folder)
    mirrored_jobs.remove_parts(folder, _is_record)
    return Store.open(folder)


def _remove_records(folder: Path) -> None:
    """Removes the files by which a killed run would resume; the manifest of a finished store contains everything."""
    for file in (*folder.glob("*-*.json"), *folder.glob(KNOWN_FILE)):
        # The records remain on read-only storage, where they do no harm.
        with contextlib.suppress(OSError):
            file.unlink()


def _is_record(name: str) -> bool:
    return name == KNOWN_FILE or PurePath(name).match("*-*.json")


@contextlib.contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    """Creates `folder` and waits until no other process writes a store in it. The lock ends with the process."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    (folder / LOCK_FILE).touch()
    with contextlib.ExitStack() as stack:
        # Two processes would write the same bytes on a file system without locks.
        with contextlib.suppress(OSError):
            stack.enter_context(wait_for_lock(folder / LOCK_FILE))
        yield


def _remove_leftovers(folder: Path, own_files: set[str]) -> None:
    """Removes unfinished files of a killed process, and shards that are not among `own_files`."""
    for file in folder.iterdir():
        if file.suffix == ".tmp" or (SHARD_NAME.match(file.name) and file.name not in own_files):
            file.unlink()


def _run_jobs(
    on_ray: bool,
    processes: int,
    is_busy: Callable[[], bool],
    work: Callable[[PrepareJob], PrepareJob],
    jobs: list[PrepareJob],
) -> Iterator[PrepareJob]:
    """Yields the results of `work` for each of `jobs`, in any order.

    Raises:
        UserError: a job could not write to the storage.
    """
    running = _run_on_machines(work, jobs) if on_ray else run_on_this_machine(work, jobs, processes, is_busy)
    # An error closes the generator, which ends the execution on Ray or in other processes at once.
    with contextlib.closing(running) as results:
        for result in results:
            if "error" in result:
                raise UserError(result["error"])
            yield result


def _run_on_machines(
    work: Callable[[PrepareJob], PrepareJob], jobs: list[PrepareJob]
) -> Generator[PrepareJob, None, None]:
    yield from mirrored_jobs.run_on_machines(_run_on_ray, work, jobs, _list_part_files, (KNOWN_FILE,))


def _list_part_files(job: PrepareJob) -> list[str]:
    """Returns the names of the files that a job writes: the record of a part comes after its shard."""
    return [job["file"], record_path(Path(job["file"])).name]


def _run_on_ray(work: Callable[[PrepareJob], PrepareJob], jobs: list[PrepareJob]) -> Generator[PrepareJob, None, None]:
    from ray.exceptions import RayError

    try:
        with contextlib.closing(ray_data.run_jobs(work, jobs)) as results:
            yield from results
    except RayError as error:
        raise StageFailed(f"prepare: {type(error).__name__}: {take_first_line(error)}") from error


def _write_parts(
    writer: PartWriter,
    jobs: list[PrepareJob],
    old: Store | None,
    run_jobs: JobRunner,
    progress: Callable[[int, int], None],
) -> tuple[list[PrepareJob], SourceStatistics]:
    """Returns the results of all jobs, in source order, and the statistics of the images, including those of `old`."""
    results, statistics = {}, load_statistics(old) if old else SourceStatistics()
    done = before = old.extension_edges[-1] if old else 0
    total = before + sum(writer.source.splits.values())
    # Images of parts that are not finished, by their files.
    begun = dict[str, int]()

    def report(job: PrepareJob, count: int) -> None:
        begun[job["file"]] = count
        progress(done + sum(begun.values()), total)

    for result in run_jobs(replace(writer, report=report), jobs):
        # Merged at once and removed: kept, the thousand classes of each part would add up.
        statistics.add(result["job"]["split"], result.pop("census"))
        results[result["job"]["file"]] = result
        begun.pop(result["job"]["file"], None)
        done += result["job"]["count"]
        progress(done + sum(begun.values()), total)
    return [results[job["file"]] for job in jobs], statistics


def _check_bad_fraction(dataset: PrepareOptions, store: Store) -> None:
    total = store.quarantined + sum(store.splits.values())
    if store.quarantined > dataset.max_bad_fraction * total:
        limit = f"dataset.max_bad_fraction: {dataset.max_bad_fraction:g} is exceeded"
        problem = describe_bad_images(store.path, store.quarantined, total)
        raise UserError(f"{limit}: {problem}; repair them, or raise dataset.max_bad_fraction to go on without them")
