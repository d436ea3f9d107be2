"""The findings of the doctor, and its advice."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.cli import doctor
from firstlight.pipeline.cli.doctor import run_checks
from firstlight.pipeline.cli.findings import OK, PROBLEM, WARNING, Finding, raise_on_problem
from firstlight.pipeline.data.augment.compiled.loading import CompiledOps
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.tracking.client import TrackingClient
from tests.support import recipes
from tests.support.object_server import serve_objects


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in found}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipes.recipe(tmp_path / "st").dump()))
    return file


def test_machine_without_problems_is_checked_and_nothing_is_created(file: Path, tmp_path: Path) -> None:
    found = by_name(run_checks(file, (), ray=False))
    assert {finding.area for finding in found.values()} == {
        "machine",
        "python",
        "versions",
        "torch",
        "storage",
        "mlflow",
    }
    for name in ("Python", "torch", "ray", "mlflow", "pillow", "augmentations", "writable", "tracking"):
        assert found[name].verdict == OK, found[name]
    assert "will be created by the first run" in found["tracking"].observation
    assert not (tmp_path / "st").exists()
    TrackingClient(recipes.recipe(tmp_path / "st"))
    assert "written and read back" in by_name(run_checks(file, (), ray=False))["tracking"].observation


def test_problems_and_warnings_come_with_advice(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"ray": "2.53.0", "numpy": "1.0"}.get(name) or real(name)
    )
    monkeypatch.setattr(doctor, "MIN_FREE_DISK", 1e18)
    monkeypatch.setattr(doctor, "BYTECODE_PACKAGES", ("tests",))
    monkeypatch.setattr(doctor, "_is_compiled", lambda name: False)
    monkeypatch.setattr(CompiledOps, "load", lambda ops: "ModuleNotFoundError: numba")
    found = by_name(
        run_checks(
            file,
            ("tracking.uri=http://127.0.0.1:9", "storage=/proc/none", "scale.gpus_per_worker=1", "scale.workers=1"),
            ray=False,
        )
    )
    assert {name for name, finding in found.items() if finding.verdict == PROBLEM} == {
        "ray",
        "tracking",
        "writable",
        "GPUs",
    }
    assert found["ray"].advice == "has known security holes; valid: 2.54 or newer"
    assert found["numpy"].verdict == WARNING
    assert found["disk"].verdict == WARNING
    assert "compileall" in found["bytecode"].advice
    assert found["augmentations"].observation == "by Pillow: ModuleNotFoundError: numba"
    assert found["augmentations"].verdict == WARNING
    assert "connection refused" in found["tracking"].observation
    with pytest.raises(StageFailed, match=r"^doctor: 4 problems: ray, "):
        raise_on_problem(list(found.values()))
    raise_on_problem([finding for finding in found.values() if finding.verdict == WARNING])


def test_driver_that_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_read_driver_version", lambda: "450.1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = doctor._check_torch(None)
    assert found.verdict == PROBLEM
    assert "driver 450.1" in found.observation


def test_check_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no such file")

    monkeypatch.setattr(doctor, "_check_python", broken)
    found = by_name(run_checks(None, (), ray=False))
    assert found["check"].verdict == PROBLEM
    assert "tracking" in found


def test_override_without_a_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="give the recipe first"):
        run_checks(Path("storage=x"), (), ray=False)


def test_missing_package_is_a_problem_with_the_tested_version() -> None:
    (found,) = doctor._check_version("no-such-package", "1.2")
    assert (found.verdict, found.advice) == (PROBLEM, "pip install no-such-package==1.2")


def test_listed_package_is_only_named_if_it_differs_or_has_a_minimum() -> None:
    version = importlib.metadata.version("numpy")
    assert list(doctor._check_version("numpy", version)) == []
    assert [found.verdict for found in doctor._check_version("numpy", "0.1")] == [WARNING]
    assert [found.verdict for found in doctor._check_version("torch", "")] == [OK]


def test_gpus_are_a_problem_only_for_a_recipe_that_needs_them_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_read_driver_version", lambda: "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    needed = {"scale__workers": 1, "scale__gpus_per_worker": 1}
    here, cluster = recipes.recipe(tmp_path, **needed), recipes.recipe(tmp_path, **needed, scale__address="auto")
    assert [found.verdict for recipe in (None, here, cluster) for found in doctor._check_torch(recipe)] == [
        OK,
        PROBLEM,
        OK,
    ]


def test_bucket_is_written_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    database = f"sqlite:///{tmp_path}/mlflow.db"
    with serve_objects(tmp_path / "cache"):
        for bucket, verdict in (("bucket", OK), ("none", PROBLEM)):
            recipe = recipes.recipe(f"s3://{bucket}/runs", tracking__uri=database)  # type: ignore[arg-type]
            file.write_text(json.dumps(recipe.dump()))
            found = by_name(run_checks(file, (), ray=False))
            assert found["bucket"].verdict == verdict, found["bucket"]
            assert found["working folder"].verdict == OK
            assert "writable" not in found
    assert found["bucket"].observation == "'s3://none/runs' cannot be written: the bucket does not exist"
    assert found["bucket"].advice.startswith("valid: a bucket that exists, and credentials")
