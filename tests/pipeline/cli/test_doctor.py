"""What the doctor finds, and what it says is to be done."""

import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.cli import doctor, doctor_nodes
from firstlight.pipeline.cli.doctor import OK, PROBLEM, WARNING, Finding, check, examine
from firstlight.pipeline.cli.findings import plain, table
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.tracking.client import Tracking
from tests.support import recipes


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in found}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipes.recipe(tmp_path / "st").dump()))
    return file


def test_a_machine_that_is_fit(file: Path, tmp_path: Path) -> None:
    found = by_name(examine(file, (), ray=False))
    assert {finding.area for finding in found.values()} == {
        "machine",
        "python",
        "versions",
        "torch",
        "storage",
        "mlflow",
    }
    for what in ("Python", "torch", "ray", "mlflow", "pillow", "writable", "tracking"):
        assert found[what].verdict == OK, found[what]
    assert "is made by the first run" in found["tracking"].found
    assert not (tmp_path / "st").exists(), "looking makes nothing"
    Tracking(recipes.recipe(tmp_path / "st"))
    assert "written and read back" in by_name(examine(file, (), ray=False))["tracking"].found


def test_what_is_wrong_is_told_with_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"ray": "2.53.0", "numpy": "1.0"}.get(name) or real(name)
    )
    monkeypatch.setattr(doctor, "FREE_DISK", 1e18)
    monkeypatch.setattr(doctor, "BYTECODE", ("tests",))
    monkeypatch.setattr(doctor, "_compiled", lambda name: False)
    found = by_name(
        examine(
            file,
            ("tracking.uri=http://127.0.0.1:9", "storage=/proc/none", "scale.gpus_per_worker=1", "scale.workers=1"),
            ray=False,
        )
    )
    assert {what for what, finding in found.items() if finding.verdict == PROBLEM} == {
        "ray",
        "tracking",
        "writable",
        "GPUs",
    }
    assert found["ray"].advice == "has known security holes; valid: 2.54 or newer"
    assert found["numpy"].verdict == WARNING
    assert found["disk"].verdict == WARNING
    assert "compileall" in found["bytecode"].advice
    assert "connection refused" in found["tracking"].found
    with pytest.raises(StageFailed, match=r"^doctor: 4 problems: ray, "):
        check(list(found.values()))
    check([finding for finding in found.values() if finding.verdict == WARNING])


def test_a_driver_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "450.1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = doctor._torch(None)
    assert found.verdict == PROBLEM
    assert "driver 450.1" in found.found


def test_a_check_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no such file")

    monkeypatch.setattr(doctor, "_python", broken)
    found = by_name(examine(None, (), ray=False))
    assert found["check"].verdict == PROBLEM
    assert "tracking" in found


def test_words_without_a_recipe() -> None:
    with pytest.raises(UserError, match="give the recipe first"):
        examine(Path("storage=x"), (), ray=False)


def test_nodes_are_compared() -> None:
    mine = doctor_nodes.facts("")
    same = {**mine, "seen": True}
    assert doctor_nodes._of_node("a", mine, same, True).verdict == OK
    other = doctor_nodes._of_node("a", mine, {**same, "torch": "2.0"}, True)
    assert (other.verdict, other.found) == (PROBLEM, f"torch 2.0 (here {mine['torch']})")
    assert "does not see the storage" in doctor_nodes._of_node("a", mine, {**same, "seen": False}, True).found
    assert doctor_nodes._of_node("a", mine, None, True).verdict == PROBLEM


def test_the_table_fits_a_terminal_and_the_lines_do_not_wrap() -> None:
    found = [Finding("machine", "CPUs", "2"), Finding("torch", "GPUs", "x " * 90, PROBLEM, "install another")]
    console = Console(file=io.StringIO(), width=80)
    console.print(table(found))
    assert isinstance(console.file, io.StringIO)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
    assert "✗" in console.file.getvalue()
    assert plain(found).splitlines()[0] == "ok\tmachine\tCPUs\t2"


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_ray_starts_and_its_node_answers(tmp_path: Path, ray_free: None) -> None:
    found = list(doctor_nodes.nodes(recipes.recipe(tmp_path, scale__cpus=2), tmp_path / "st"))
    assert [finding.verdict for finding in found] == [OK, OK], found
    assert "2 CPUs" in found[0].found
    assert not list((tmp_path / "st").iterdir())
