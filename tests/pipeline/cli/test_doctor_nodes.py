"""The checks of Ray's nodes."""

from pathlib import Path

import pytest

from firstlight.pipeline.cli.doctor_nodes import _compare_node, check_nodes, collect_node_facts
from firstlight.pipeline.cli.findings import OK, PROBLEM, WARNING
from firstlight.pipeline.data.mirror.places import TravellingPath
from tests.support import recipes
from tests.support.buckets import make_mirror


def test_facts_tell_whether_the_probe_is_seen(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("x")
    assert collect_node_facts(TravellingPath(tmp_path / "probe"))["seen"] is True
    assert collect_node_facts(TravellingPath(tmp_path / "other"))["seen"] is False
    assert collect_node_facts(None)["seen"] is False


def test_node_with_other_versions_is_a_problem_in_a_cluster_only() -> None:
    local = collect_node_facts(None)
    same = {**local, "seen": True}
    assert _compare_node("a", local, same, True).verdict == OK
    differing = _compare_node("a", local, {**same, "torch": "2.0"}, True)
    assert (differing.verdict, differing.observation) == (PROBLEM, f"torch 2.0 (here {local['torch']})")
    assert _compare_node("a", local, {**same, "torch": "2.0"}, False).verdict == WARNING


def test_node_without_the_storage_or_without_an_answer_is_a_problem() -> None:
    local = collect_node_facts(None)
    blind = _compare_node("a", local, {**local, "seen": False}, True)
    assert (blind.verdict, blind.observation) == (PROBLEM, "does not see the storage")
    silent = _compare_node("a", local, None, True)
    assert (silent.subject, silent.verdict) == ("node a", PROBLEM)
    assert "did not run a task within" in silent.observation


@pytest.mark.ray
def test_ray_starts_and_its_node_answers(tmp_path: Path, ray_free: None) -> None:
    findings = list(check_nodes(recipes.recipe(tmp_path, scale__cpus=2), tmp_path / "st"))
    assert [finding.verdict for finding in findings] == [OK, OK], findings
    assert "2 CPUs" in findings[0].observation
    assert not list((tmp_path / "st").iterdir())


def test_probe_in_a_bucket_is_seen_by_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = make_mirror(tmp_path, "probed", monkeypatch)
    probe = TravellingPath(mirror.root / ".doctor-1")
    assert collect_node_facts(probe)["seen"] is False
    mirror.bucket.write(".doctor-1", b"x")
    assert collect_node_facts(probe)["seen"] is True
