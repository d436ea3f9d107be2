"""The comparison of kept and returned memory: both arms do the same work, and the table has their ratio."""

import pytest
from click.testing import CliRunner

from bench import host_memory
from bench.host_memory import KEPT, RETURNED


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    for name, trains in (("small", False), ("small, trained", True)):
        monkeypatch.setitem(
            host_memory.MEMORY_CASES, name, ({"name": "convnet", "width": 4, "depth": 2}, 16, 8, 2, trains)
        )
    return "small"


@pytest.mark.parametrize("case", ["small", "small, trained"])
@pytest.mark.parametrize("arm", [KEPT, RETURNED])
def test_a_case_is_measured(small: str, case: str, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(host_memory, "set_up_cpu", called.append)
    found = host_memory.measure_case(case, arm)
    assert found["own"] + found["system"] > 0
    assert found["peak_mb"] > 1
    assert called == ([1] if arm == KEPT else [])


def test_ratio_below_one_means_that_keeping_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        KEPT: {"own": 2.0, "system": 0.0, "peak_mb": 900.0},
        RETURNED: {"own": 2.0, "system": 2.0, "peak_mb": 600.0},
    }
    monkeypatch.setattr(host_memory, "compare_arms", lambda name, rounds: rows)
    found = CliRunner().invoke(host_memory.main, [])
    assert found.exit_code == 0
    assert found.output.count("0.50") == len(host_memory.MEMORY_CASES)
    assert "900 / 600 MB" in found.output
