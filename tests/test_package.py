"""The checkout and the wheel: what is in them, and that the wheel works beside another package called `tasks`."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# The files and folders of the checkout that `pip wheel` reads.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "firstlight", "pipeline", "tasks", "conf")
PAGE_FILES = {"firstlight/pipeline/report/page.html", "firstlight/pipeline/report/page.js"}
# The largest file of the checkout, a figure of the documentation, has a tenth of it.
MOST_BYTES = 2**20
OTHER_FILES = PAGE_FILES | {"firstlight/py.typed", "firstlight/constraints.txt"}
IMPORT_BOTH = """
import tasks, firstlight, firstlight.tasks.nn.encoders as encoders, firstlight.pipeline.cli.main
from firstlight.pipeline.config.load import load_recipe
assert tasks.OWNER == "somebody else", tasks.__file__
assert encoders.ENCODERS
print(firstlight.__file__, encoders.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("setuptools or pip is not installed here, and a build without isolation needs both")
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (file,) = out.glob("firstlight-*.whl")
    return file


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wheel_has_the_sources_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"firstlight/{file.relative_to(ROOT)}"
        for folder, ending in (("pipeline", "py"), ("tasks", "py"), ("conf", "yaml"))
        for file in (ROOT / folder).rglob(f"*.{ending}")
    }
    assert names == expected | OTHER_FILES | {"firstlight/__init__.py"}


def test_wheel_names_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        licence = archive.read(f"{Path(metadata).parent}/licenses/LICENSE").decode()
    assert "License-Expression: Apache-2.0" in text
    assert licence == (ROOT / "LICENSE").read_text("utf-8")
    assert "Version 2.0, January 2004" in licence


def test_wheel_works_beside_another_package_called_tasks(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text('OWNER = "somebody else"\n')
    installed = tmp_path / "installed"
    pip("install", "--no-deps", "--target", str(installed), str(wheel))
    # The foreign module is found first, as one beside a notebook is.
    code = f"import sys; sys.path[:0] = {[str(tmp_path), str(installed)]!r}\n{IMPORT_BOTH}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(file.startswith(str(installed)) for file in done.stdout.split())


def test_command_of_the_wheel_is_the_command_line(wheel: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert f"firstlight = {scripts['firstlight']}" in archive.read(entry_points).decode()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")
def test_checkout_has_no_large_files_and_no_packages() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"this is no checkout of git: {listed.stderr.strip()}")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert ROOT / "README.md" in files
    assert not [file for file in files if file.is_file() and file.stat().st_size > MOST_BYTES]
    assert not [file for file in files if file.suffix in {".whl", ".gz", ".zip"}]
