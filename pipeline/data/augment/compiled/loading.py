"""Loads the compiled augmentations in the background, once a process makes so many views that this pays.

To load them takes half a second and 60 MB, and to compile them 15 seconds, once for a version of the code on a machine.
Until they are there Pillow makes the views, with the same pixels. They are kept in the user's cache folder, under a
hash of all that they follow from.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import shutil
import threading
from pathlib import Path

from firstlight.pipeline.code_cache import hash_sources, locate_cache
from firstlight.pipeline.data.augment.compiled.agreement import MakeViews, find_difference

# Pixels of views that a process makes with Pillow in half a second or more.
PAYING_PIXELS = 8_000_000
# Folders of other versions of the code that are kept, the ones that were used last.
MAX_KEPT_VERSIONS = 4
FOLDER_PREFIX = "augmentations-"
AUGMENT_SOURCES = Path(__file__).parent.parent


class CompiledOps:
    """The compiled augmentations of this process."""

    def __init__(self) -> None:
        self._make_views: MakeViews | None = None
        self._pixels = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        # Why they cannot be used; empty if they can, or were not needed yet.
        self.obstacle = ""

    def find(self, pixels: int) -> MakeViews | None:
        """Returns the function that makes views, or None as long as Pillow makes them.

        `pixels`: the number of pixels of the views that will be made now.
        """
        if self._make_views is None and self._thread is None:
            with self._lock:
                self._pixels += pixels
                if self._pixels >= PAYING_PIXELS and self._thread is None:
                    # The end of the process waits for it: it would end badly amid the work of a compiler.
                    self._thread = threading.Thread(target=self.load, name="compile augmentations")
                    self._thread.start()
        return self._make_views

    def load(self) -> str:
        """Loads them now, compiled if need be. Returns why they cannot be used, empty if they can."""
        try:
            make_views = _load_make_views(_locate_machine_code())
            difference = find_difference(make_views)
        except Exception as error:
            # Pillow makes the same views, whatever it was.
            self.obstacle = f"{type(error).__name__}: {error}"
        else:
            self.obstacle = f"other pixels than Pillow's: {difference}" if difference else ""
            self._make_views = None if difference else make_views
        return self.obstacle


# The ones of this process.
compiled_ops = CompiledOps()


def _locate_machine_code() -> Path:
    """Returns the folder of the machine code, which need not exist."""
    sources = [*AUGMENT_SOURCES.glob("*.py"), *AUGMENT_SOURCES.glob("compiled/*.py")]
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    return locate_cache() / f"{FOLDER_PREFIX}{hash_sources(sources, *versions)[:32]}"


def _load_make_views(folder: Path) -> MakeViews:
    """Returns the compiled `make_views`. One process of a machine compiles it, others wait for it.

    Raises:
        OSError: the folder cannot be written.
        Exception: whatever numba raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    _remove_old_versions(folder)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        from firstlight.pipeline.data.augment.compiled.compiler import compile_for_python
        from firstlight.pipeline.data.augment.compiled.views import make_views

        return compile_for_python(make_views, folder)


def _remove_old_versions(current: Path) -> None:
    # Another process may remove them at the same time.
    with contextlib.suppress(OSError):
        others = [folder for folder in current.parent.glob(f"{FOLDER_PREFIX}*") if folder != current]
        for old in sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)[MAX_KEPT_VERSIONS:]:
            shutil.rmtree(old, ignore_errors=True)
