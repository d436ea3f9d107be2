"""`firstlight doctor`: is this machine fit for Firstlight, or for a recipe, and what is to be done about it."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.version import Version

from firstlight.pipeline import ROOT
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.tracking.location import Records
from firstlight.pipeline.tracking.retry import hasty, reason

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe

OK, WARNING, PROBLEM = "ok", "warning", "problem"
CONSTRAINTS = ROOT / "constraints.txt"
# The oldest versions without known holes: torch CVE-2026-24747, ray CVE-2026-27482, mlflow CVE-2026-2614 and -2651, Pillow CVE-2026-40192
FLOORS = {"torch": "2.10", "ray": "2.54", "mlflow": "3.11", "pillow": "12.3"}
SHOWN = ("torch", "torchvision", "ray", "mlflow", "timm", "pyarrow", "numpy", "pillow", "safetensors", "pydantic")
BYTECODE = ("torch", "ray", "mlflow", "sklearn")  # large ones, imported by every worker
PYTHON = (3, 11)
GB = 1e9
SHM = "/dev/shm"  # noqa: S108 - where Ray keeps its objects
FREE_MEMORY, FREE_DISK, SHM_FREE, FILES = 2 * GB, 5 * GB, 1 * GB, 4096  # below them: a warning


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `advice`: what to do, where there is something."""

    area: str
    what: str
    found: str
    verdict: str = OK
    advice: str = ""


def examine(file: Path | None, overrides: tuple[str, ...], ray: bool) -> list[Finding]:
    """All findings; no check ends the others.

    Raises:
        UserError: a mistake in the recipe.
    """
    from firstlight.pipeline.config.recipe import load

    if file is not None and "=" in str(file):  # key=value without a recipe
        raise UserError(f"{file}: give the recipe first: firstlight doctor recipe.yaml {file}")
    recipe = load(file, overrides) if file else None
    records = (
        Records.of(recipe)
        if recipe
        else Records(Path("runs").resolve(), f"sqlite:///{Path('runs').resolve() / 'mlflow.db'}", "firstlight")
    )
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("machine", lambda: _machine(recipe)),
        ("python", _python),
        ("versions", _versions),
        ("torch", lambda: _torch(recipe)),
        ("storage", lambda: _storage(records.storage)),
        ("mlflow", lambda: _mlflow(records)),
    ]
    if ray:
        from firstlight.pipeline.cli.doctor_nodes import nodes

        checks.append(("ray", lambda: nodes(recipe, records.storage)))
    found: list[Finding] = []
    for area, check in checks:
        try:
            found += check()
        except Exception as error:
            found.append(
                Finding(
                    area, "check", f"{type(error).__name__}: {reason(error)}", PROBLEM, "this check could not be made"
                )
            )
    return found


def check(found: list[Finding]) -> None:
    """Raises `StageFailed` where there is a problem."""
    problems = [finding.what for finding in found if finding.verdict == PROBLEM]
    if problems:
        raise StageFailed(f"doctor: {len(problems)} problem{'s' if len(problems) > 1 else ''}: {', '.join(problems)}")


def _enough(area: str, what: str, found: str, enough: bool, advice: str) -> Finding:
    return Finding(area, what, found) if enough else Finding(area, what, found, WARNING, advice)


def _machine(recipe: "Recipe | None") -> Iterator[Finding]:
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    told = f"{usable}" + (f" of {cores} may be used" if usable < cores else "")
    yield _enough("machine", "CPUs", told, usable >= 2, "Ray wants two: scale.workers=0 does without it")
    memory = psutil.virtual_memory()
    told = f"{memory.available / GB:.1f} GB free of {memory.total / GB:.1f} GB"
    yield _enough(
        "machine", "memory", told, memory.available >= FREE_MEMORY, "close other programs, or lower stream.resident_mb"
    )
    temporary = shutil.disk_usage(tempfile.gettempdir())
    told = f"{temporary.free / GB:.1f} GB free in {tempfile.gettempdir()}"
    yield _enough(
        "machine", "disk", told, temporary.free >= FREE_DISK, "Ray and torch write there: free some, or set TMPDIR"
    )
    shared, needed = shutil.disk_usage(SHM), recipe.scale.object_store_mb * 2**20 if recipe else SHM_FREE
    advice = "enlarge it (docker: --shm-size=1g): Ray falls back to slow files"
    yield _enough("machine", SHM, f"{shared.free / GB:.1f} GB free", shared.free >= needed, advice)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _enough("machine", "open files", f"at most {files:,}", files >= FILES, "Ray opens many: ulimit -n 65536")


def _python() -> Iterator[Finding]:
    told = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < PYTHON:
        yield Finding("python", "Python", told, PROBLEM, f"valid: {'.'.join(map(str, PYTHON))} or newer")
    else:
        yield Finding("python", "Python", f"{told}, {sys.prefix}")
    bare = [name for name in BYTECODE if not _compiled(name)]
    advice = (
        f"{sys.executable} -m compileall -qq -j 0 {Path(sys.prefix) / 'lib'}: every worker parses them anew until then"
    )
    yield _enough("python", "bytecode", f"not compiled: {', '.join(bare)}" if bare else "compiled", not bare, advice)


def _compiled(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is None or spec.origin is None or Path(importlib.util.cache_from_source(spec.origin)).exists()


def _versions() -> Iterator[Finding]:
    """Against the floors of security, and what was tested."""
    tested = _tested()
    apart = []
    for name in SHOWN:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                "versions", name, "is not installed", PROBLEM, f"pip install {name}=={tested.get(name, '')}".rstrip("=")
            )
            continue
        public = Version(version).public
        if name in FLOORS and Version(public) < Version(FLOORS[name]):
            yield Finding(
                "versions", name, version, PROBLEM, f"has known security holes; valid: {FLOORS[name]} or newer"
            )
        elif name in tested and public != tested[name]:
            apart.append(name)
            yield Finding(
                "versions", name, version, WARNING, f"tested with {tested[name]}: pip install -c constraints.txt -e ."
            )
        elif name in FLOORS:
            yield Finding("versions", name, version)
    others = [name for name in tested if name not in SHOWN and _differs(name, tested[name])]
    told = (
        f"{len(others)} others differ: {', '.join(others[:6])}{' ...' if len(others) > 6 else ''}"
        if others
        else "as tested"
    )
    if not tested:
        told = "no constraints.txt beside this installation to compare with"
    yield _enough("versions", "all others", told, not others, "pip install -c constraints.txt -e .")


def _tested() -> dict[str, str]:
    lines = CONSTRAINTS.read_text("utf-8").splitlines() if CONSTRAINTS.exists() else []
    return {name: version for name, sign, version in (line.partition("==") for line in lines) if sign}


def _differs(name: str, tested: str) -> bool:
    """What is not installed is no matter: constraints name more than every machine needs."""
    try:
        return Version(importlib.metadata.version(name)).public != tested
    except importlib.metadata.PackageNotFoundError:
        return False


def _torch(recipe: "Recipe | None") -> Iterator[Finding]:
    import torch

    wanted = recipe is not None and recipe.scale.gpus_per_worker > 0
    build = torch.version.cuda
    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        free = [torch.cuda.mem_get_info(k) for k in range(len(names))]
        for k, (name, (left, total)) in enumerate(zip(names, free, strict=True)):
            told = f"{name}, {left / GB:.0f} GB free of {total / GB:.0f} GB"
            yield _enough("torch", f"GPU {k}", told, left > total / 2, "another process holds its memory: nvidia-smi")
        yield Finding("torch", "driver", f"{driver or 'unknown'}, torch built for CUDA {build}")
    elif driver:
        told = f"driver {driver}, torch built for CUDA {build or 'none'}"
        advice = (
            "install the torch build for this driver, or a newer driver: https://pytorch.org/get-started"
            if build
            else "this torch is for CPUs only"
        )
        yield Finding("torch", "GPUs", f"there, but torch cannot use them: {told}", PROBLEM, advice)
    else:
        told = "none" + (
            f"; the recipe asks for {recipe.scale.gpus_per_worker:g} a worker" if wanted and recipe else ""
        )
        local = recipe is None or recipe.scale.address == "local"
        yield Finding(
            "torch",
            "GPUs",
            told,
            PROBLEM if wanted and local else OK,
            "scale.gpus_per_worker=0" if wanted and local else "",
        )


def _driver() -> str:
    """The version of NVIDIA's driver; "" where there is none."""
    try:
        found = re.search(r"Module\s+([\d.]+)", Path("/proc/driver/nvidia/version").read_text("utf-8"))
    except OSError:
        return ""
    return found[1] if found else "unknown"


def _storage(storage: Path) -> Iterator[Finding]:
    there = next(folder for folder in (storage, *storage.parents) if folder.exists())
    probe = there / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        advice = "valid: a folder that you may write to"
        yield Finding("storage", "writable", f"{there}: {os.strerror(error.errno or 0)}", PROBLEM, advice)
        return
    yield Finding("storage", "writable", f"{storage}{'' if there == storage else ' (not there yet)'}")
    free = shutil.disk_usage(there).free
    yield _enough(
        "storage",
        "space",
        f"{free / GB:.1f} GB free",
        free >= FREE_DISK,
        "stores, checkpoints and artifacts go there: free some",
    )


def _mlflow(records: Records) -> Iterator[Finding]:
    """Reached, written and read back; nothing is created where nothing is."""
    import logging

    import mlflow

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    if records.database and not records.database.exists():
        yield Finding("mlflow", "tracking", f"{records.uri} is made by the first run")
        return
    started, stamp = time.monotonic(), uuid.uuid4().hex
    try:
        with hasty():
            client = mlflow.MlflowClient(records.uri)
            experiment = client.get_experiment_by_name(records.experiment)
            if experiment is not None:
                client.set_experiment_tag(experiment.experiment_id, "firstlight.doctor", stamp)
                again = client.get_experiment(experiment.experiment_id).tags.get("firstlight.doctor")
                assert again == stamp
    except Exception as error:
        yield Finding(
            "mlflow", "tracking", f"{records.uri}: {reason(error)}", PROBLEM, "start the server, or mend tracking.uri"
        )
        return
    told = "written and read back" if experiment else f"reached; no experiment {records.experiment!r} yet"
    seconds = time.monotonic() - started
    yield _enough(
        "mlflow",
        "tracking",
        f"{records.uri}: {told} in {seconds:.1f} s",
        seconds < 10,
        "it is slow: runs will wait for it",
    )
