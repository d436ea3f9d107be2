"""Jobs that write files of a store on the machines of a cluster, for a storage in a bucket.

A machine downloads the files that its job reads, and uploads those that it has written. They count once the machine
that began the store has them, and uploads the store with its manifest.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firstlight.pipeline.data.mirror.mirror import Mirror
from firstlight.pipeline.data.mirror.places import TravellingPath, explain_outage, find_mirror
from firstlight.pipeline.errors import StageFailed
from firstlight.pipeline.files import temporary_path

MARK_PREFIX = ".machine-"


# The key in the result of a job that says that it ran on another machine.
ELSEWHERE_KEY = "elsewhere"


@dataclass(frozen=True)
class TravellingJob:
    """`work` on any machine. `list_files`: the names of the files that a job writes, and may read.

    `shared`: the names of files that all jobs read. `mark`: a file that only the machine has that began the store.
    """

    work: Any
    folder: TravellingPath
    list_files: Callable[[dict[str, Any]], Sequence[str]]
    shared: tuple[str, ...]
    mark: str

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """Returns the result of the job, or {"error"}."""
        folder = self.folder.path
        mirror = find_mirror(folder)
        if mirror is None or (folder / self.mark).exists():
            return dict(self.work(job))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name in self.shared:
                if not (folder / name).exists():
                    download_part(mirror, folder / name)
            for name in self.list_files(job):
                download_part(mirror, folder / name)
            result = dict(replace(self.work, folder=folder)(job))
            for name in self.list_files(job):
                if (folder / name).exists():
                    mirror.send_file(folder, name)
        except OSError as error:
            return {"error": explain_outage(mirror, error, "used")}
        return {**result, ELSEWHERE_KEY: True}


def download_part(mirror: Mirror, file: Path) -> None:
    """Downloads a file of a store that is not finished, if there is one; its readers check it. Raises OSError."""
    temporary = temporary_path(file.parent)
    try:
        with contextlib.suppress(FileNotFoundError):
            mirror.bucket.download(mirror.get_name(file), temporary)
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def make_mark(folder: Path) -> str:
    """Writes a file that shows that a process is on this machine. Returns its name."""
    for old in folder.glob(f"{MARK_PREFIX}*"):
        old.unlink(missing_ok=True)
    name = f"{MARK_PREFIX}{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def run_on_machines(
    run: Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]],
    work: Any,
    jobs: list[Any],
    list_files: Callable[[dict[str, Any]], Sequence[str]],
    shared: Sequence[str],
) -> Iterator[Any]:
    """Yields the results of `run(work, jobs)`, each when the files that its job has written are on this machine.

    `work` is a dataclass with a `folder`, in which jobs read and write the files `list_files(job)`; `shared`: the names
    of further files there that all jobs read, if they exist.

    Raises:
        StageFailed: the bucket cannot be read or written; names `storage`.
    """
    folder: Path = work.folder
    mirror = find_mirror(folder)
    if mirror is None or not jobs:
        yield from run(work, jobs)
        return
    found = tuple(name for name in shared if (folder / name).exists())
    try:
        for name in found:
            mirror.send_file(folder, name)
        travelling = TravellingJob(work, TravellingPath(folder), list_files, found, make_mark(folder))
        for result in run(travelling, jobs):
            if result.pop(ELSEWHERE_KEY, False):
                for name in list_files(result["job"]):
                    download_part(mirror, folder / name)
            yield result
    except OSError as error:
        raise StageFailed(explain_outage(mirror, error, "used")) from None


def remove_parts(folder: Path, is_part: Callable[[str], bool]) -> None:
    """Removes from the bucket what the jobs of a finished store have left; if that fails, it stays."""
    mirror = find_mirror(folder)
    if mirror is not None:
        with contextlib.suppress(OSError):
            mirror.bucket.delete(mirror.get_name(folder / name) for name in mirror.list_files(folder) if is_part(name))
