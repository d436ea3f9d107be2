"""The commands about this machine and a cluster, from their arguments to what they print."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from firstlight.pipeline.cli import doctor, submit
from firstlight.pipeline.cli.findings import PROBLEM, Finding
from firstlight.pipeline.errors import StageFailed
from tests.support.command_output import run_command


def test_doctor_prints_lines_in_a_pipe_and_fails_with_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("machine", "CPUs", "2")]
    monkeypatch.setattr(doctor, "run_checks", lambda recipe, overrides, ray: findings)
    assert run_command("doctor") == "ok\tmachine\tCPUs\t2\n"
    findings.append(Finding("torch", "GPUs", "none", PROBLEM, "buy one"))
    with pytest.raises(StageFailed, match="doctor: 1 problem: GPUs"):
        run_command("doctor", "recipe.yaml", "scale.workers=2", "--ray")


def test_detached_job_is_sent_and_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = list[Any]()

    def send_job(client: Any, address: str, recipe: Path, resolved: Any, with_source: bool, verbose: bool) -> Any:
        sent.append((client, address, recipe, with_source, verbose))
        return SimpleNamespace(id="job-7", instructions=lambda: "follow it so")

    monkeypatch.setattr(submit, "connect_to_cluster", lambda address: f"client of {address}")
    monkeypatch.setattr(submit, "send_job", send_job)
    monkeypatch.setattr(submit, "check_paths", lambda recipe: [])
    address = "http://127.0.0.1:8265"
    answer = run_command("submit", "quickstart", "--address", f"{address}/", "--installed", "--detach")
    assert sent == [(f"client of {address}", address, Path("quickstart"), False, False)]
    assert "sent: job-7" in answer
    assert "follow it so" in answer
