"""The machine code of the augmentations, kept in the user's cache folder: made by another process, used by many.

A folder belongs to one version of the sources at one place, of the compiler, and of the machine's CPU. Its manifest,
written last, has the sums of its files. The process that compiles runs this module as its main program, see
`child_module`. It takes 12 seconds of a CPU, and ends with the one that has started it, which then loads what was made.
A compiler in the background of that one could not be stopped at its end.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from pydantic import TypeAdapter

from firstlight.pipeline.child_module import open_answers
from firstlight.pipeline.code_cache import hash_sources, list_oldest, locate_cache
from firstlight.pipeline.data.augment.compiled.steps import MakeViews
from firstlight.pipeline.data.manifest import file_sha256
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import LOCK_FILE, wait_for_lock
from firstlight.pipeline.records import HexDigest, read_json_record, write_sealed_json

# Folders of other versions that are kept, the ones that were used last.
MAX_KEPT_VERSIONS = 8
FOLDER_PREFIX = "augmentations-"
AUGMENT_SOURCES = Path(__file__).parent.parent
CPU_FILE = Path("/proc/cpuinfo")
CODE_MANIFEST = "manifest.json"
CODE_MANIFEST_SHAPE = TypeAdapter(dict[str, dict[str, HexDigest] | str])
# The least share of the CPUs: nobody waits for the compiler.
COMPILER_NICENESS = 19


def locate_machine_code() -> Path:
    """Returns the folder of the machine code that this process would use, which need not exist.

    Raises:
        importlib.metadata.PackageNotFoundError: numba is not installed.
    """
    sources = [*AUGMENT_SOURCES.glob("*.py"), *AUGMENT_SOURCES.glob("compiled/*.py")]
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    key = hash_sources(sources, *versions, str(AUGMENT_SOURCES), _describe_cpu())
    return locate_cache() / f"{FOLDER_PREFIX}{key[:32]}"


def _describe_cpu() -> str:
    """Returns what machine code depends on: the name of the CPU and its instructions."""
    try:
        lines = CPU_FILE.read_text("utf-8", "replace").partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(names))])


def is_whole(folder: Path) -> bool:
    """Returns True if a folder has its manifest, and all files are as they were written."""
    try:
        manifest = read_json_record(folder / CODE_MANIFEST, CODE_MANIFEST_SHAPE)
        return manifest is not None and manifest["files"] == _sum_files(folder)
    except (UserError, OSError, KeyError):
        return False


def _sum_files(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*.nb?") if file.is_file()]
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}


def compile_machine_code(folder: Path) -> None:
    """Fills a folder with machine code, unless another process has done so, which this one waits for.

    Raises:
        OSError or UserError: the folder cannot be written.
        Exception: whatever numba raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(folder / LOCK_FILE):
        if is_whole(folder):
            return
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
        load_machine_code(folder)
        write_sealed_json(folder / CODE_MANIFEST, {"files": _sum_files(folder)})
    _remove_old_versions(folder)


def load_machine_code(folder: Path) -> MakeViews:
    """Returns the compiled `make_views` of a folder, which is filled if it is empty."""
    from firstlight.pipeline.data.augment.compiled.compiler import compile_for_python
    from firstlight.pipeline.data.augment.compiled.views import make_views

    # It may be of another user. The times tell which versions are in use.
    with contextlib.suppress(OSError):
        os.utime(folder)
    return compile_for_python(make_views, folder)


def _remove_old_versions(current: Path) -> None:
    others = (folder for folder in current.parent.glob(f"{FOLDER_PREFIX}*") if folder != current)
    for old in list_oldest(others, MAX_KEPT_VERSIONS):
        # Another process may remove it at the same time.
        shutil.rmtree(old, ignore_errors=True)


def _compile_for_parent() -> None:
    """Compiles for the process that has started this one, and tells it what went wrong, if anything."""
    with open_answers() as answer:
        os.nice(COMPILER_NICENESS)
        try:
            compile_machine_code(locate_machine_code())
        except Exception as error:
            answer({"problem": f"{type(error).__name__}: {error}"})
        else:
            answer({"problem": ""})


if __name__ == "__main__":
    _compile_for_parent()
    # Its thread that looks for the parent is left where it is.
    os._exit(0)
