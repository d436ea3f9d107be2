"""Commands that read a recipe or list something start without the libraries that train: their imports take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.folders_of_noise import write_noise_folder
from tests.support.mlflow_runs import chain

# Each takes half a second or more.
HEAVY = (
    "torch",
    "torchvision",
    "numba",
    "timm",
    "ray",
    "mlflow",
    "matplotlib",
    "scipy",
    "sklearn",
    "faiss",
    "onnx",
    "pandas",
)
RUN = f"""
import sys
from firstlight.pipeline.cli.main import cli, run_guarded
code = run_guarded(lambda: cli(sys.argv[1:], standalone_mode=False))
print("loaded:", *[name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""


def run_alone(folder: Path, *arguments: str) -> tuple[int, str, str, str]:
    """Runs a command in a new process, in an empty folder. Returns its exit code, what it loaded, its errors and its
    output.
    """
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], cwd=folder, capture_output=True, text=True)
    output, _, loaded = done.stdout.rpartition("loaded:")
    return done.returncode, loaded.strip(), done.stderr, output


@pytest.fixture(scope="module")
def parameters_are_known(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first process of a changed checkout reads the parameters of all methods, and has the optimisers checked."""
    assert run_alone(tmp_path_factory.mktemp("first"), "config", "quickstart")[0] == 0


# A command that ends when it begins to write the store of its recipe.
BEGIN = f"""
import sys
from firstlight.pipeline.cli.main import cli
from firstlight.pipeline.run.preparing.ahead import StoreAhead
StoreAhead.start = lambda self: sys.exit("loaded: " + " ".join(name for name in {HEAVY} if name in sys.modules))
cli(sys.argv[1:], standalone_mode=False)
"""


@pytest.mark.usefixtures("parameters_are_known")
@pytest.mark.parametrize("command", ["prepare", "run", "pretrain"])
def test_store_is_begun_before_heavy_modules_are_loaded(tmp_path: Path, command: str) -> None:
    write_noise_folder(tmp_path / "images", {"a": 9, "b": 9}, (32, 32))
    arguments = ("folder", f"dataset.root={tmp_path / 'images'}", f"storage={tmp_path}", "scale=local")
    begun = [sys.executable, "-c", BEGIN, command, *arguments]
    assert subprocess.run(begun, cwd=tmp_path, capture_output=True, text=True).stderr == "loaded: \n"


@pytest.mark.usefixtures("parameters_are_known")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("recipes",), 0, ""),
        (("runs",), 2, "does not exist: nothing was run in storage"),
        (("config", "quickstart"), 0, ""),
        (("run", "quickstart", "stages.pretrain.epoch=3"), 2, "stages.pretrain.epoch: unknown key"),
        (("run", "quickstart", "stages.pretrain.method.dim=x"), 2, 'stages.pretrain.method.dim: "x" is not valid'),
        (("run", "nat/no_such_recipe"), 2, "no recipe of Firstlight has this name"),
    ],
)
def test_command_loads_no_heavy_module(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, loaded, errors, _ = run_alone(tmp_path, *arguments)
    assert (found, loaded) == (code, "")
    assert message in errors


def test_runs_of_a_database_are_listed_and_shown_without_mlflow(tmp_path: Path) -> None:
    _, runs = chain(tmp_path)
    for arguments in (("runs",), ("show", runs["first"])):
        code, loaded, _, output = run_alone(tmp_path, *arguments, f"storage={tmp_path}")
        assert (code, loaded) == (0, "")
        assert runs["first"] in output, arguments
