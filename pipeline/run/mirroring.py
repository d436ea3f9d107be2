"""The files of a run in a `storage` that is a bucket: downloaded at its start, uploaded when they are whole.

An upload that fails waits and is repeated, while the work goes on.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.mirror.mirror import CHECKPOINT_FOLDER, Mirror
from firstlight.pipeline.data.mirror.places import (
    explain_outage,
    fetch_if_possible,
    fetch_unit,
    find_mirror,
    find_place,
    find_unit,
)
from firstlight.pipeline.errors import StageFailed, UserError, describe_os_error
from firstlight.pipeline.records import read_json_record
from firstlight.pipeline.stages.shared_work import SHARED_FOLDER, SHARED_SHAPE
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.outbox import FLUSH_POLL_S, FLUSH_TIMEOUT_S, Unpublished

# Seconds between two looks at what the workers of a cluster have uploaded.
FOLLOW_S = 15.0
# The folder of a run with networks that were downloaded from MLflow: made again from there.
INPUTS_FOLDER = "inputs"


class NotUploaded(Unpublished):
    """The stages have finished, and files of them are on this machine only."""


class RunMirror:
    """Uploads and downloads of one command's run of a recipe. Where `storage` is a folder, nothing is done.

    `folder`: that of the run. `tell`: prints a note for the user.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self.folder, self.tell, self.mirror = folder, tell, find_mirror(folder)
        self.waiting: dict[Path, None] = {}
        self._is_out = False

    def fetch_run(self) -> None:
        """Downloads what the run has in the bucket and this machine lacks, without checkpoints and stores.

        Raises:
            UserError: the bucket cannot be read; names `storage`.
        """
        mirror = self.mirror
        if mirror is None:
            return
        try:
            units = mirror.list_units(self.folder)
        except OSError as error:
            raise UserError(explain_outage(mirror, error)) from None
        mirror.forget_units(self.folder, units)
        for unit in units:
            if not CHECKPOINT_FOLDER.match(unit.name):
                # Logs are useful without the result, and a run in MLflow is continued.
                for line in fetch_unit(unit, salvages=True):
                    self.tell(line)

    def put(self, *folders: Path) -> None:
        """Uploads what has changed in some folders, at once or later."""
        if self.mirror is not None:
            self.waiting |= dict.fromkeys(find_unit(folder) for folder in folders)
            self._upload_waiting(self.mirror)

    def put_run(self) -> None:
        """Uploads what has changed in the folder of the run and those of its stages, at once or later."""
        below = [path for path in sorted(self.folder.glob("[!.]*")) if path.is_dir() and path.name != INPUTS_FOLDER]
        self.put(self.folder, *below)

    def _upload_waiting(self, mirror: Mirror, force: bool = False) -> None:
        """Tries the waiting uploads in their order, up to the first that fails."""
        for unit in list(self.waiting):
            problem = mirror.attempt(lambda unit=unit: mirror.push(unit), force)  # type: ignore[misc]
            if problem:
                self._note_outage(mirror, problem)
                return
            del self.waiting[unit]
        if self._is_out:
            self.tell(f"storage: {mirror.uri!r} is reachable again, and has all that was waiting")
            self._is_out = False

    def _note_outage(self, mirror: Mirror, problem: str) -> None:
        """Prints a note, once for each outage."""
        if not self._is_out:
            place = f"its files are kept in {mirror.root} and uploaded later"
            self.tell(f"storage: {mirror.uri!r} cannot be written ({problem}): the work goes on, {place}")
        self._is_out = True

    def flush(self, rows: Sequence[Any] = ()) -> None:
        """Uploads what waits, for at most FLUSH_TIMEOUT_S seconds.

        Raises:
            NotUploaded: it stayed impossible; names `storage` and what is not uploaded, and carries `rows`.
        """
        mirror, end = self.mirror, time.monotonic() + FLUSH_TIMEOUT_S
        if mirror is None:
            return
        self._upload_waiting(mirror, force=True)
        while self.waiting and time.monotonic() < end:
            time.sleep(FLUSH_POLL_S)
            self._upload_waiting(mirror, force=True)
        if self.waiting:
            names = ", ".join(unit.relative_to(mirror.root).as_posix() for unit in self.waiting)
            what = f"{len(self.waiting)} folders are in {mirror.root} and not uploaded ({names})"
            error = NotUploaded(
                f"storage: {mirror.uri!r} cannot be written: {what}; run the same command on this machine again to "
                "upload them"
            )
            error.rows = tuple(rows)
            raise error


def check_bucket(mirror: Mirror) -> None:
    """Writes an object, reads it back and removes it.

    Raises:
        UserError: it is not possible; names `storage` and the reason.
    """
    name, valid = f".write-{uuid.uuid4().hex[:8]}", "a bucket that exists, and credentials that may write to it"
    try:
        mirror.bucket.write(name, name.encode())
        found = mirror.bucket.read(name)
        mirror.bucket.delete([name])
    except OSError as error:
        reason = describe_os_error(error, 300)
        raise UserError(f"storage: {mirror.uri!r} cannot be written: {reason}; valid: {valid}") from None
    if found != name.encode():
        raise UserError(f"storage: {mirror.uri!r} does not return what was written; valid: {valid}")


def fetch_shared_work(run_folder: Path) -> None:
    """Downloads, on a worker's machine, the work of other stages that a stage of this run may use instead of its own.

    Damaged work is done again.
    """
    if find_mirror(run_folder) is None:
        return
    with contextlib.suppress(UserError):
        fetch_if_possible(run_folder / SHARED_FOLDER)
    for file in sorted((run_folder / SHARED_FOLDER).glob("*.json")):
        with contextlib.suppress(UserError):
            found = read_json_record(file, SHARED_SHAPE)
            if found is not None and ".." not in Path(found["folder"]).parts:
                fetch_if_possible(run_folder / found["folder"])


def find_fetched(location: str) -> Path:
    """Returns the path on this machine of a location that another one has named, after a download of its unit.

    Raises:
        UserError: it is not here and cannot be downloaded; names the object or `storage`.
    """
    path = find_place(location)
    fetch_if_possible(path)
    return path


def upload_results(folder: Path) -> None:
    """Uploads what a worker has made. Files that fail are uploaded by the driver, if it is on this machine."""
    mirror = find_mirror(folder)
    if mirror is not None:
        for unit in (folder.parent / SHARED_FOLDER, folder):
            mirror.attempt(lambda unit=unit: mirror.push(unit), force=True)  # type: ignore[misc]


def upload_inputs(recipe: Recipe, instances: Sequence[StageInstance]) -> None:
    """Uploads what the machines of a cluster read for some instances. Nothing is done for a Ray of this machine alone.

    Raises:
        StageFailed: the bucket cannot be written, so that nothing can reach them; names `storage`.
    """
    mirror = find_mirror(instances[0].folder)
    if mirror is None or recipe.scale.address == "local":
        return
    needed: list[Path | None] = []
    for one in instances:
        needed += [one.folder, one.encoder, one.given, *one.companions.values()]
    try:
        for unit in dict.fromkeys(find_unit(path) for path in needed if path and find_mirror(path)):
            mirror.push(unit)
    except OSError as error:
        raise StageFailed(explain_outage(mirror, error, "written")) from None


@contextlib.contextmanager
def share_folders(recipe: Recipe, instances: Sequence[StageInstance]) -> Iterator[None]:
    """Uploads, before the block, what the workers of a cluster read; downloads, during and after it, what they made.

    Nothing is done for a Ray of this machine alone, or if `storage` is a folder, which all machines see.

    Raises:
        StageFailed: the bucket cannot be written, so that nothing can reach the workers; names `storage`.
    """
    mirror = find_mirror(instances[0].folder)
    if mirror is None or recipe.scale.address == "local":
        yield
        return
    upload_inputs(recipe, instances)
    made = [instance.folder for instance in instances]
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(made, ended), daemon=True, name="downloads")
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
    for folder in (made[0].parent / SHARED_FOLDER, *made):
        with contextlib.suppress(UserError):
            fetch_if_possible(folder)


def check_results(instances: Sequence[StageInstance]) -> None:
    """Checks that what workers on other machines have made is here.

    Raises:
        StageFailed: it is not; names `storage`.
    """
    missing = [instance.label for instance in instances if instance.result is None]
    mirror = find_mirror(instances[0].folder)
    if missing and mirror is not None:
        raise StageFailed(
            f"storage: {mirror.uri!r} does not have what the workers made ({', '.join(missing)}): it could not be "
            "uploaded or downloaded; run the same command again"
        )


def _follow(folders: Sequence[Path], ended: threading.Event) -> None:
    """Downloads what workers on other machines upload with each checkpoint, for the numbers that are shown."""
    while not ended.wait(FOLLOW_S):
        for folder in folders:
            with contextlib.suppress(UserError):
                fetch_if_possible(folder)
