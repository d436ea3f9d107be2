"""`firstlight doctor`: checks this machine for Firstlight or for a recipe, and says what to do about each problem."""

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.version import Version

from firstlight.pipeline import ROOT
from firstlight.pipeline.cli.findings import OK, PROBLEM, WARNING, Finding, warn_unless
from firstlight.pipeline.code_cache import locate_cache
from firstlight.pipeline.data.augment.compiled.loading import CompiledOps
from firstlight.pipeline.data.mirror.mirror import Mirror
from firstlight.pipeline.data.mirror.places import find_mirror
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.mirroring import check_bucket
from firstlight.pipeline.tracking.connection import measure_round_trip
from firstlight.pipeline.tracking.location import TrackingLocation, parse_location
from firstlight.pipeline.tracking.retry import describe_failure
from firstlight.pipeline.usable_cpus import count_usable_cpus

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe

CONSTRAINTS_FILE = ROOT / "constraints.txt"
# The oldest versions without known security holes: torch CVE-2026-24747, ray CVE-2026-27482,
# mlflow CVE-2026-2614 and CVE-2026-2651, Pillow CVE-2026-40192.
MIN_VERSIONS = {"torch": "2.10", "ray": "2.54", "mlflow": "3.11", "pillow": "12.3"}
LISTED_PACKAGES = (
    *("torch", "torchvision", "ray", "mlflow", "timm", "pyarrow", "numpy", "pillow", "safetensors", "pydantic"),
)
# Large packages that every worker imports.
BYTECODE_PACKAGES = ("torch", "ray", "mlflow", "sklearn")
MIN_PYTHON = (3, 11)
GB = 1e9
# Ray keeps its objects there.
SHM_FOLDER = "/dev/shm"  # noqa: S108
# Bytes, and a number of files, below which there is a warning.
MIN_FREE_MEMORY, MIN_FREE_DISK, MIN_FREE_SHM, MIN_OPEN_FILES = 2 * GB, 5 * GB, 1 * GB, 4096
# Seconds after which an answer of MLflow counts as slow.
SLOW_MLFLOW_S = 10


def run_checks(file: Path | None, overrides: tuple[str, ...], ray: bool) -> list[Finding]:
    """Returns the findings of all checks; a check that fails becomes a finding and does not end the others.

    Raises:
        UserError: the recipe has a mistake.
    """
    # Its import makes the kinds of stages known to recipes.
    import firstlight.pipeline.stages.registry  # noqa: F401
    from firstlight.pipeline.config.load import load_recipe

    # key=value without a recipe
    if file is not None and "=" in str(file):
        raise UserError(f"{file}: give the recipe first: firstlight doctor recipe.yaml {file}")
    recipe = load_recipe(file, overrides) if file else None
    records = TrackingLocation.of(recipe) if recipe else parse_location(())
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("machine", lambda: _check_machine(recipe)),
        ("python", lambda: _check_python()),
        ("versions", lambda: _check_versions()),
        ("torch", lambda: _check_torch(recipe)),
        ("storage", lambda: _check_storage_folder(records.storage)),
        ("mlflow", lambda: _check_mlflow(records)),
    ]
    if ray:
        from firstlight.pipeline.cli.doctor_nodes import check_nodes

        checks.append(("ray", lambda: check_nodes(recipe, records.storage)))
    findings: list[Finding] = []
    for area, check in checks:
        try:
            findings += check()
        except Exception as error:
            observation = f"{type(error).__name__}: {describe_failure(error)}"
            findings.append(Finding(area, "check", observation, PROBLEM, "this check could not be made"))
    return findings


def _check_machine(recipe: "Recipe | None") -> Iterator[Finding]:
    cores, usable = os.cpu_count() or 1, count_usable_cpus()
    cpus = f"{usable}" + (f" usable of {cores}" if usable < cores else "")
    yield warn_unless(usable >= 2, "machine", "CPUs", cpus, "Ray needs two; scale.workers=0 runs without Ray")
    memory = psutil.virtual_memory()
    observation = f"{memory.available / GB:.1f} GB free of {memory.total / GB:.1f} GB"
    advice = "close other programs, or lower stream.resident_mb"
    yield warn_unless(memory.available >= MIN_FREE_MEMORY, "machine", "memory", observation, advice)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    observation = f"{free / GB:.1f} GB free in {tempfile.gettempdir()}"
    advice = "Ray and torch write there: free some space, or set TMPDIR"
    yield warn_unless(free >= MIN_FREE_DISK, "machine", "disk", observation, advice)
    shared, needed = shutil.disk_usage(SHM_FOLDER).free, _object_store_bytes(recipe)
    advice = "enlarge it (docker: --shm-size=1g); without it Ray uses slow files"
    yield warn_unless(shared >= needed, "machine", SHM_FOLDER, f"{shared / GB:.1f} GB free", advice)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "Ray opens many files: ulimit -n 65536"
    yield warn_unless(files >= MIN_OPEN_FILES, "machine", "open files", f"at most {files:,}", advice)


def _object_store_bytes(recipe: "Recipe | None") -> float:
    return recipe.scale.object_store_bytes if recipe else MIN_FREE_SHM


def _check_python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MIN_PYTHON:
        yield Finding("python", "Python", version, PROBLEM, f"valid: {'.'.join(map(str, MIN_PYTHON))} or newer")
    else:
        yield Finding("python", "Python", f"{version}, {sys.prefix}")
    missing = [name for name in BYTECODE_PACKAGES if not _is_compiled(name)]
    observation = f"not compiled: {', '.join(missing)}" if missing else "compiled"
    compile_all = f"{sys.executable} -m compileall -qq -j 0 {Path(sys.prefix) / 'lib'}"
    advice = f"{compile_all}: until then every worker parses these packages again"
    yield warn_unless(not missing, "python", "bytecode", observation, advice)
    obstacle = CompiledOps().load()
    observation = f"by Pillow: {obstacle}" if obstacle else "compiled"
    advice = f"the same views, several times slower: install numba, or let this user write to {locate_cache()}"
    yield warn_unless(not obstacle, "python", "augmentations", observation, advice)


def _is_compiled(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is None or spec.origin is None or Path(importlib.util.cache_from_source(spec.origin)).exists()


def _check_versions() -> Iterator[Finding]:
    """Compares installed versions with the oldest secure ones and with the tested ones."""
    tested = _read_constraints()
    for name in LISTED_PACKAGES:
        yield from _check_version(name, tested.get(name, ""))
    advice = "pip install -c constraints.txt -e ."
    if not tested:
        yield Finding("versions", "all others", "this installation has no constraints.txt to compare with")
        return
    others = [name for name in tested if name not in LISTED_PACKAGES and _differs_from_tested(name, tested[name])]
    listing = ", ".join(others[:6]) + (" ..." if len(others) > 6 else "")
    observation = f"{len(others)} others differ: {listing}" if others else "as tested"
    yield warn_unless(not others, "versions", "all others", observation, advice)


def _check_version(name: str, tested: str) -> Iterator[Finding]:
    """Yields nothing about a package that is as tested and has no entry in `MIN_VERSIONS`."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        requirement = f"{name}=={tested}" if tested else name
        yield Finding("versions", name, "is not installed", PROBLEM, f"pip install {requirement}")
        return
    public = Version(version).public
    if name in MIN_VERSIONS and Version(public) < Version(MIN_VERSIONS[name]):
        advice = f"has known security holes; valid: {MIN_VERSIONS[name]} or newer"
        yield Finding("versions", name, version, PROBLEM, advice)
    elif tested and public != tested:
        advice = f"tested with {tested}: pip install -c constraints.txt -e ."
        yield Finding("versions", name, version, WARNING, advice)
    elif name in MIN_VERSIONS:
        yield Finding("versions", name, version)


def _read_constraints() -> dict[str, str]:
    """Returns the tested version of each package; empty if the installation has no constraints file."""
    lines = CONSTRAINTS_FILE.read_text("utf-8").splitlines() if CONSTRAINTS_FILE.exists() else []
    return {name: version for name, sign, version in (line.partition("==") for line in lines) if sign}


def _differs_from_tested(name: str, tested: str) -> bool:
    """Returns False for packages that are not installed: the constraints list more than every machine needs."""
    try:
        return Version(importlib.metadata.version(name)).public != tested
    except importlib.metadata.PackageNotFoundError:
        return False


def _check_torch(recipe: "Recipe | None") -> Iterator[Finding]:
    import torch

    build, driver = torch.version.cuda, _read_driver_version()
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(k)
            observation = f"{torch.cuda.get_device_name(k)}, {free / GB:.0f} GB free of {total / GB:.0f} GB"
            advice = "another process uses its memory: nvidia-smi"
            yield warn_unless(free > total / 2, "torch", f"GPU {k}", observation, advice)
        yield Finding("torch", "driver", f"{driver or 'unknown'}, torch built for CUDA {build}")
    elif driver:
        observation = f"torch cannot use them: driver {driver}, torch built for CUDA {build or 'none'}"
        url = "https://pytorch.org/get-started"
        advice = (
            f"install the torch build for this driver, or a newer driver: {url}"
            if build
            else "this torch is for CPUs only"
        )
        yield Finding("torch", "GPUs", observation, PROBLEM, advice)
    else:
        yield _check_missing_gpus(recipe)


def _check_missing_gpus(recipe: "Recipe | None") -> Finding:
    """Returns a problem if the recipe needs GPUs on this machine, which has none."""
    wanted = recipe.scale.worker_gpus if recipe else 0
    observation = "none" + (f"; the recipe needs {wanted:g} per worker" if wanted > 0 else "")
    if wanted > 0 and recipe is not None and recipe.scale.address == "local":
        return Finding("torch", "GPUs", observation, PROBLEM, "scale.gpus_per_worker=0")
    return Finding("torch", "GPUs", observation, OK)


def _read_driver_version() -> str:
    """Returns the version of NVIDIA's driver, "" without a driver."""
    try:
        match = re.search(r"Module\s+([\d.]+)", Path("/proc/driver/nvidia/version").read_text("utf-8"))
    except OSError:
        return ""
    return match[1] if match else "unknown"


def _check_storage_folder(storage: Path) -> Iterator[Finding]:
    mirror = find_mirror(storage)
    if mirror is not None:
        yield _check_storage_bucket(mirror)
    existing = next(folder for folder in (storage, *storage.parents) if folder.exists())
    probe = existing / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        observation = f"{existing}: {os.strerror(error.errno or 0)}"
        yield Finding("storage", "writable", observation, PROBLEM, "valid: a folder that you may write to")
        return
    subject = "writable" if mirror is None else "working folder"
    yield Finding("storage", subject, f"{storage}{'' if existing == storage else ' (does not exist yet)'}")
    free = shutil.disk_usage(existing).free
    advice = "stores, checkpoints and artifacts are written there: free some space"
    yield warn_unless(free >= MIN_FREE_DISK, "storage", "space", f"{free / GB:.1f} GB free", advice)


def _check_storage_bucket(mirror: Mirror) -> Finding:
    started = time.monotonic()
    try:
        check_bucket(mirror)
    except UserError as error:
        problem, _, valid = str(error).removeprefix("storage: ").partition("; ")
        return Finding("storage", "bucket", problem, PROBLEM, valid)
    seconds = time.monotonic() - started
    return Finding("storage", "bucket", f"{mirror.uri}: written, read back and removed in {seconds:.1f} s")


def _check_mlflow(records: TrackingLocation) -> Iterator[Finding]:
    """Connects, writes a tag and reads it back. A database that does not exist is not created."""
    if records.database and not records.database.exists():
        yield Finding("mlflow", "tracking", f"{records.uri} will be created by the first run")
        return
    try:
        seconds, experiment = measure_round_trip(records, "firstlight.doctor")
    except Exception as error:
        observation = f"{records.uri}: {describe_failure(error)}"
        yield Finding("mlflow", "tracking", observation, PROBLEM, "start the server, or correct tracking.uri")
        return
    result = "written and read back" if experiment else f"connected; no experiment {records.experiment!r} yet"
    observation = f"{records.uri}: {result} in {seconds:.1f} s"
    advice = "it is slow: runs will wait for it"
    yield warn_unless(seconds < SLOW_MLFLOW_S, "mlflow", "tracking", observation, advice)
