"""What is sent to a cluster, what is found before that, and what comes back. `tests/test_cluster.py` has the files of clusters."""

import os
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission
import requests
from click.testing import CliRunner, Result
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from firstlight.pipeline.cli import submit
from firstlight.pipeline.cli.main import cli, guarded
from firstlight.pipeline.cli.submit import Job, check_address, check_places, follow, pack, resolve
from firstlight.pipeline.config.catalog import FOLDER, listed
from firstlight.pipeline.config.recipe import load
from firstlight.pipeline.errors import StageFailed, Terminated, UserError
from firstlight.pipeline.run.ray_session import close_token_file

QUICKSTART = FOLDER / "quickstart.yaml"
HERE = "http://127.0.0.1:8265"
SHARED = "storage=/shared/firstlight"
JOB = Job("quickstart-1", HERE)


class Cluster:
    """A job API that keeps what it is sent; its job says `texts`, one connection after the other, and then `ends`."""

    def __init__(self, *texts: Any, ends: str = "SUCCEEDED", code: int | None = 0, message: str = "") -> None:
        self.texts, self.info = (
            list(texts),
            SimpleNamespace(status=JobStatus(ends), driver_exit_code=code, message=message),
        )
        self.sent: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.refusals: list[Exception] = []

    def submit_job(self, **sent: Any) -> str:
        if self.refusals:
            raise self.refusals.pop(0)
        folder = Path(sent["runtime_env"]["working_dir"])
        self.files = {
            file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
        self.sent = sent
        return str(sent["submission_id"])

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in self.texts.pop(0):
            if isinstance(text, BaseException):
                raise text
            yield text

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=JobStatus.RUNNING) if self.texts else self.info


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(["one\n", "two\n"])
    monkeypatch.setattr(submit, "connect", lambda address: found)
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    return found


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["submit", *map(str, words)], standalone_mode=False)


@pytest.mark.parametrize("recipe", listed(), ids=lambda recipe: recipe.name)
def test_what_is_sent_is_the_recipe_as_it_resolves(tmp_path: Path, recipe: Any) -> None:
    path = FOLDER / f"{recipe.name}.yaml"
    root = () if "root" not in path.read_text() and load_root(path) else ("dataset.root=/shared/images",)
    found = resolve(path, (SHARED, *root), False)
    words = pack(path, found, tmp_path, code=False)
    assert load(tmp_path / words[-1]) == found
    assert found.scale.address != "local"


def load_root(path: Path) -> bool:
    """Whether the recipe loads without the root of its images."""
    try:
        load(path)
    except UserError:
        return False
    return True


def test_nothing_else_is_sent(cluster: Cluster, tmp_path: Path) -> None:
    result = run(QUICKSTART, SHARED, "--address", f"{HERE}/", "--smoke", "-v")
    assert result.return_value == 0, result.output
    assert cluster.sent["entrypoint"] == "python -m pipeline run conf/recipe/quickstart-smoke.yaml -v"
    assert cluster.sent["metadata"] == {"recipe": "quickstart-smoke"}
    assert "pipeline/cli/submit.py" in cluster.files
    assert "tasks/pretrain/nat.py" in cluster.files
    assert {Path(name).suffix for name in cluster.files} == {".py", ".yaml", ".html"}
    assert {Path(name).parts[0] for name in cluster.files} == {"pipeline", "tasks", "conf"}
    assert not Path(cluster.sent["runtime_env"]["working_dir"]).exists()
    assert "one\ntwo\n" in result.output


def test_with_an_image_only_the_recipe_is_sent(cluster: Cluster) -> None:
    assert run(QUICKSTART, SHARED, "--address", HERE, "--installed").return_value == 0
    assert {Path(name).parts[0] for name in cluster.files} == {"conf"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "storage: 'runs' would be in the job's own folder"),
        ((SHARED, "scale.workrs=2"), "scale.workrs: unknown key"),
        ((SHARED, "stages.pretrain.batch_size=127", "scale.workers=2"), "stages.pretrain.batch_size: 127 is not valid"),
        ((SHARED, "stages.evaluate.layers=[9]"), "stages.evaluate.layers: 9 is not one of the encoder's"),
        (
            (SHARED, "tracking.uri=sqlite:///mlflow.db"),
            "tracking.uri: 'sqlite:///mlflow.db' would be in the job's own folder",
        ),
        ((SHARED, "tracking.uri=mlruns"), "tracking.uri: 'mlruns' is not valid"),
        ((SHARED, "dataset.extends=stores/x"), "dataset.extends: 'stores/x' would be in the job's own folder"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(cluster: Cluster, words: tuple[str, ...], message: str) -> None:
    result = run(QUICKSTART, *words, "--address", HERE)
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(message)
    assert not cluster.sent


def test_all_places_that_cannot_work_are_named_at_once() -> None:
    with pytest.raises(UserError) as told:
        check_places(resolve(FOLDER / "folder_nat.yaml", ("dataset.root=photos",), False))
    assert [line.split(":")[0] for line in str(told.value).splitlines()] == ["storage", "dataset.root"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), ["tracking.uri: null means SQLite"]),
        (("tracking.uri=sqlite:////shared/mlflow.db",), ["tracking.uri: SQLite on a network folder"]),
        (("tracking.uri=http://localhost:5000",), ["tracking.uri: 'http://localhost:5000' is the head of the cluster"]),
        (("tracking.uri=http://mlflow:5000",), []),
        (("tracking.uri=http://mlflow:5000", "scale.workers=0"), ["scale.workers: 0 trains on the head"]),
    ],
)
def test_what_may_go_wrong_is_told(words: tuple[str, ...], told: list[str]) -> None:
    found = check_places(resolve(QUICKSTART, (SHARED, *words), False))
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


@pytest.mark.parametrize("address", ["10.0.0.1:8265", "ray://10.0.0.1:10001", "auto", "http://", ""])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match=r"^--address: .* is not valid; valid: that of the dashboard"):
        check_address(address)


def test_a_token_is_not_sent_unencrypted_without_a_word() -> None:
    assert check_address("https://ray.example.com") == check_address(HERE) == check_address("http://[::1]:8265") == []
    assert "reads the token" in check_address("http://10.0.0.1:8265")[0]


@pytest.mark.parametrize(
    ("ends", "code", "expected", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", 1, 1, ""),
        ("STOPPED", 143, 143, "the job was stopped"),
        ("FAILED", None, 1, "error: the job failed: no such image"),
    ],
)
def test_the_exit_code_is_the_job_s(cluster: Cluster, ends: str, code: int | None, expected: int, said: str) -> None:
    cluster.info = Cluster(ends=ends, code=code, message="no such\nimage").info
    result = run(QUICKSTART, SHARED, "--address", HERE)
    assert result.return_value == expected
    assert said in result.output
    assert guarded(lambda: result.return_value) == expected


def test_a_broken_connection_is_made_anew_and_nothing_is_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    said: list[str] = []
    away = requests.exceptions.ConnectionError("away")
    connections = [["one\n", "tw", RuntimeError("closed")], [away], ["one\ntwo\n", "three\n"]]
    assert follow(Cluster(*connections), JOB, said.append) == 0  # type: ignore[arg-type]
    assert "".join(said) == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_is_given_up_with_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    monkeypatch.setattr(submit, "AWAY_S", 0.05)
    cluster = Cluster(*[[OSError("away")]] * 10**6)
    monkeypatch.setattr(cluster, "get_job_info", lambda job: (_ for _ in ()).throw(OSError("away")))
    with pytest.raises(StageFailed, match=rf"has not answered .*\n.*see it: .*--address {HERE} quickstart-1"):
        follow(cluster, JOB, lambda text: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stopped", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(cluster: Cluster, stopped: BaseException, code: int) -> None:
    cluster.texts = [["one\n", stopped]]
    before = signal.getsignal(signal.SIGINT)
    result = run(QUICKSTART, SHARED, "--address", HERE)
    assert result.return_value == code
    job = cluster.sent["submission_id"]
    assert f"job logs --follow --address {HERE} {job}" in result.output
    assert f"job stop --address {HERE} {job}" in result.output
    assert signal.getsignal(signal.SIGINT) is before


def test_detached_it_is_not_waited_for(cluster: Cluster) -> None:
    result = run(QUICKSTART, SHARED, "--address", HERE, "--detach")
    assert result.return_value == 0
    assert "the job goes on" in result.output
    assert len(cluster.texts) == 1


def test_a_cluster_that_has_just_started_is_asked_again(cluster: Cluster) -> None:
    cluster.refusals = [RuntimeError("Request failed with status code 500: No available agent to submit job")]
    assert run(QUICKSTART, SHARED, "--address", HERE).return_value == 0
    cluster.refusals = [RuntimeError("Request failed with status code 400: no")]
    assert isinstance(run(QUICKSTART, SHARED, "--address", HERE).exception, StageFailed)


@pytest.mark.parametrize(
    ("error", "mode", "message"),
    [
        (AuthenticationError("401"), "disabled", "wants a token"),
        (AuthenticationError("403"), "token", "refuses the token that this machine has"),
        (ConnectionError("Failed to connect"), "token", "is no Ray cluster that answers: Failed to connect"),
        (
            RuntimeError("Version check returned 404. x"),
            "token",
            "is no Ray cluster that answers: Version check returned 404",
        ),
    ],
)
def test_why_nobody_is_let_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, mode: str, message: str
) -> None:
    def refuse(address: str) -> None:
        raise error

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(UserError, match=message) as told:
        submit.connect(HERE)
    assert len(str(told.value).splitlines()) == 1
    assert os.environ["RAY_API_SERVER_ADDRESS"] == HERE


@pytest.mark.parametrize("named", [True, False])
def test_a_token_that_ray_has_left_open_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool) -> None:
    file = tmp_path / ("token" if named else ".ray/auth_token")
    file.parent.mkdir(exist_ok=True)
    file.write_text("secret")
    file.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file) if named else "")
    close_token_file()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.unlink()
    close_token_file()
