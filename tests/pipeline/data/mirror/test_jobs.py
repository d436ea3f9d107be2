"""Jobs of `prepare` on another machine: they find what they read, and what they write arrives."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.mirror import jobs as jobs_module
from firstlight.pipeline.data.mirror.jobs import TravellingJob, remove_parts, run_on_machines
from firstlight.pipeline.errors import StageFailed
from tests.support.buckets import make_mirror, open_elsewhere, write_files

Work = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Appender:
    """Appends the shared file to the file of the job."""

    folder: Path

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        file = self.folder / job["file"]
        before = file.read_text() if file.exists() else ""
        file.write_text(before + (self.folder / "shared").read_text())
        return {"job": job, "folder": str(self.folder)}


def list_files(job: dict[str, Any]) -> list[str]:
    return [job["file"]]


def run_here(work: Work, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return map(work, jobs)


def test_jobs_run_on_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_mirror(tmp_path / "here", "jobs", monkeypatch)
    folder = write_files(here.root / "stores" / "digits-1", shared="s")

    def run_there(work: Work, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        sent = pickle.dumps(work)
        there = open_elsewhere(tmp_path / "there", "jobs", monkeypatch)
        moved = pickle.loads(sent)
        assert isinstance(moved, TravellingJob)
        assert moved.folder.path == there.root / "stores" / "digits-1"
        for job in jobs:
            yield moved(job)

    jobs = [{"file": "a"}, {"file": "b"}]
    results = list(run_on_machines(run_there, Appender(folder), jobs, list_files, ["shared", "none"]))
    assert [result["job"] for result in results] == jobs
    assert {result["folder"] for result in results} == {
        str(tmp_path / "there" / here.root.name / "stores" / "digits-1")
    }
    assert [(folder / name).read_text() for name in "ab"] == ["s", "s"]
    # A file that a job rewrites arrives, too.
    list(run_on_machines(run_there, Appender(folder), jobs[:1], list_files, ["shared"]))
    assert [(folder / name).read_text() for name in "ab"] == ["ss", "s"]
    assert not here.has_unit(folder), "parts are no store"
    remove_parts(folder, lambda name: name == "shared")
    assert here.bucket.list_names() == ["stores/digits-1/a", "stores/digits-1/b"]


def test_jobs_of_this_machine_send_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_mirror(tmp_path / "here", "jobs", monkeypatch)
    folder = write_files(here.root / "stores" / "digits-1", shared="s")
    results = list(run_on_machines(run_here, Appender(folder), [{"file": "a"}], list_files, []))
    assert results == [{"job": {"file": "a"}, "folder": str(folder)}]
    assert here.bucket.list_names() == []
    plain = write_files(tmp_path / "plain", shared="s")
    assert len(list(run_on_machines(run_here, Appender(plain), [{"file": "a"}], list_files, ["shared"]))) == 1
    assert sorted(path.name for path in plain.iterdir()) == ["a", "shared"]


def test_outage_is_an_error_that_names_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_mirror(tmp_path / "here", "jobs", monkeypatch)
    folder = write_files(here.root / "stores" / "digits-1", shared="s")

    def fail(*arguments: Any) -> None:
        raise OSError(5, "no connection")

    monkeypatch.setattr(here.bucket, "upload", fail)
    with pytest.raises(StageFailed, match=r"^storage: 'memory://jobs/runs' cannot be used: no connection"):
        list(run_on_machines(run_here, Appender(folder), [{"file": "a"}], list_files, ["shared"]))
    monkeypatch.setattr(here.bucket, "download", fail)
    monkeypatch.setattr(jobs_module, "make_mark", lambda folder: "none")
    (result,) = run_on_machines(run_here, Appender(folder), [{"file": "a"}], list_files, [])
    assert result == {"error": "storage: 'memory://jobs/runs' cannot be used: no connection; run it again to continue"}
