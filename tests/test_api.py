"""`import firstlight`: its names, what it costs, and the example of the README."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import firstlight
from tests.support import recipes
from tests.support.paths import ROOT

# Prints which of these an import has loaded.
HEAVY = ("torch", "torchvision", "ray", "mlflow", "matplotlib", "pandas", "numpy", "pydantic")
IMPORT_ALL = """
import importlib, pkgutil, sys
import firstlight.pipeline, firstlight.tasks
for package in (firstlight.pipeline, firstlight.tasks):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
names = {name.split(".")[0] for name in sys.modules}
print(sorted(names & {"pipeline", "tasks", "conf"}))
files = {}
for name, module in list(sys.modules.items()):
    if file := getattr(module, "__file__", None):
        files.setdefault(__import__("os").path.realpath(file), []).append(name)
print([names for file, names in files.items() if len(names) > 1 and any(n.startswith("firstlight") for n in names)])
print(sum(name.startswith("firstlight.") for name in sys.modules) > 150)
"""


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "passive 1000"),
        ({"GOMP_SPINCOUNT": "5"}, "passive 5"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        # So it is in a process that another one has started.
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}, "passive 1000"),
    ],
)
def test_threads_of_torch_sleep_after_a_short_wait_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    show = "import firstlight, os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    assert run_python(show)[0] == expected


def test_import_loads_nothing_heavy() -> None:
    assert run_python(f"import sys, firstlight; print([name for name in {HEAVY} if name in sys.modules])")[0] == "[]"


def test_error_class_is_found_without_torch() -> None:
    assert run_python("import sys, firstlight; firstlight.UserError; print('torch' in sys.modules)")[0] == "False"


def test_no_module_is_imported_under_two_names() -> None:
    assert run_python(IMPORT_ALL)[:3] == ["[]", "[]", "True"]


@pytest.mark.parametrize("name", firstlight.__all__)
def test_name_leads_to_an_object_with_a_docstring(name: str) -> None:
    value = getattr(firstlight, name)
    assert isinstance(value, dict) or value.__doc__
    assert name in dir(firstlight)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        firstlight.pretrian  # noqa: B018


def test_registries_are_those_that_recipes_choose_from() -> None:
    assert {"nat", "super_and"} <= firstlight.METHODS.keys()
    assert {"classify", "segment", "detect"} <= firstlight.TASKS.keys()
    assert {"resnet18", "timm"} <= firstlight.ENCODERS.keys()


@pytest.mark.usefixtures("blank_figures")
def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small recipe stands in for the quickstart."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipes.RECIPE))
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (20, 12), "red").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.rand(4, 3, 8, 8)}
    exec(example.replace("conf/recipe/quickstart.yaml", "recipe.yaml"), names)
    assert names["maps"][-1].shape[0] == 4
    assert isinstance(names["vectors"], np.ndarray)
    assert names["vectors"].shape[0] == 2
