"""The files that are sent to a cluster, the mistakes that are found before that, and a job that is followed."""

import os
import signal
import stat
import subprocess
import sys
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
from firstlight.pipeline.cli.main import cli, run_guarded
from firstlight.pipeline.cli.submit import (
    SubmittedJob,
    check_address,
    check_paths,
    follow_job,
    pack_files,
    resolve_recipe,
)
from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.errors import StageFailed, Terminated, UserError
from firstlight.pipeline.run.ray_session import close_token_file
from tests.support.paths import WITHOUT_ROOT

QUICKSTART = RECIPES_FOLDER / "quickstart.yaml"
# A recipe that trains on Ray.
DIGITS = RECIPES_FOLDER / "digits.yaml"
HERE = "http://127.0.0.1:8265"
SHARED = "storage=/shared/firstlight"
JOB = SubmittedJob("quickstart-1", HERE)


class Cluster:
    """A job API that keeps what it is sent. Its job prints `texts`, one for each connection, and then `ends`."""

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
    monkeypatch.setattr(submit, "connect_to_cluster", lambda address: found)
    monkeypatch.setattr(submit, "JOB_POLL_S", 0.0)
    return found


def run_submit(*words: str) -> Result:
    return CliRunner().invoke(cli, ["submit", *map(str, words)], standalone_mode=False)


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_is_sent_as_it_resolves(tmp_path: Path, networks_built_once: None, recipe: Any) -> None:
    path = RECIPES_FOLDER / f"{recipe.name}.yaml"
    root = () if recipe.name in WITHOUT_ROOT else ("dataset.root=/shared/images",)
    found = resolve_recipe(path, (SHARED, *root), False)
    words = pack_files(path, found, tmp_path, code=False)
    assert load_recipe(tmp_path / words[-1]) == found
    assert found.scale.address != "local"


def test_package_and_recipe_are_sent_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    result = run_submit(QUICKSTART, SHARED, "--address", f"{HERE}/", "--smoke", "-v")
    assert result.return_value == 0, result.output
    assert cluster.sent["entrypoint"] == "python -m firstlight.pipeline run conf/recipe/quickstart-smoke.yaml -v"
    assert cluster.sent["metadata"] == {"recipe": "quickstart-smoke"}
    assert "firstlight/pipeline/cli/submit.py" in cluster.files
    assert "firstlight/tasks/pretrain/nat.py" in cluster.files
    others = {name for name in cluster.files if Path(name).suffix not in {".py", ".yaml"}}
    page = ("pipeline/report/page.html", "pipeline/report/page.js")
    assert others == {f"firstlight/{name}" for name in ("constraints.txt", "py.typed", *page)}
    assert {Path(name).parts[0] for name in cluster.files} == {"firstlight", "conf"}
    folders = {Path(name).parts[1] for name in cluster.files if name.startswith("firstlight/") and name.count("/") > 1}
    assert folders == {"pipeline", "tasks", "conf"}
    assert not Path(cluster.sent["runtime_env"]["working_dir"]).exists()
    assert "one\ntwo\n" in result.output


def test_command_runs_the_sent_source_and_not_the_installed_one(tmp_path: Path) -> None:
    """Files are sent, not links; a change in them shows in the command that runs there."""
    recipe = resolve_recipe(QUICKSTART, (SHARED,), False)
    words = pack_files(QUICKSTART, recipe, tmp_path, code=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
    main = tmp_path / "firstlight/pipeline/cli/main.py"
    main.write_text(main.read_text().replace("A recipe is one YAML file", "This is the sent source"))
    command = [sys.executable, *words[1:3], "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert "This is the sent source" in answer.stdout, answer.stderr
    script = "import firstlight.tasks as t, firstlight.pipeline as p; print(t.__file__, p.ROOT)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert answer.stdout.split() == [str(tmp_path / "firstlight/tasks/__init__.py"), str(tmp_path / "firstlight")]


def test_installed_sends_the_recipe_alone(cluster: Cluster) -> None:
    assert run_submit(QUICKSTART, SHARED, "--address", HERE, "--installed").return_value == 0
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
    result = run_submit(QUICKSTART, *words, "--address", HERE)
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(message)
    assert not cluster.sent


def test_all_paths_that_cannot_work_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        check_paths(resolve_recipe(RECIPES_FOLDER / "folder_nat.yaml", ("dataset.root=photos",), False))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["storage", "dataset.root"]


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ((), ["tracking.uri: null means SQLite"]),
        (("tracking.uri=sqlite:////shared/mlflow.db",), ["tracking.uri: SQLite on a network folder"]),
        (("tracking.uri=http://localhost:5000",), ["tracking.uri: 'http://localhost:5000' is the head of the cluster"]),
        (("tracking.uri=http://mlflow:5000",), []),
        (("tracking.uri=http://mlflow:5000", "scale.workers=0"), ["scale.workers: 0 trains on the head"]),
    ],
)
def test_doubtful_settings_are_warnings(words: tuple[str, ...], starts: list[str]) -> None:
    found = check_paths(resolve_recipe(DIGITS, (SHARED, *words), False))
    assert len(found) == len(starts)
    assert all(line.startswith(start) for line, start in zip(found, starts, strict=True))


@pytest.mark.parametrize("address", ["10.0.0.1:8265", "ray://10.0.0.1:10001", "auto", "http://", ""])
def test_invalid_addresses_are_refused(address: str) -> None:
    with pytest.raises(
        UserError, match=r"^--address: .* is not valid; valid: the address of a Ray cluster.s dashboard"
    ):
        check_address(address)


def test_unencrypted_address_is_a_warning() -> None:
    assert check_address("https://ray.example.com") == check_address(HERE) == check_address("http://[::1]:8265") == []
    assert "can read the token" in check_address("http://10.0.0.1:8265")[0]


@pytest.mark.parametrize(
    ("ends", "code", "expected", "text"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", 1, 1, ""),
        ("STOPPED", 143, 143, "the job was stopped"),
        ("FAILED", None, 1, "error: the job failed: no such image"),
    ],
)
def test_exit_code_is_that_of_the_job(cluster: Cluster, ends: str, code: int | None, expected: int, text: str) -> None:
    cluster.info = Cluster(ends=ends, code=code, message="no such\nimage").info
    result = run_submit(QUICKSTART, SHARED, "--address", HERE)
    assert result.return_value == expected
    assert text in result.output
    assert run_guarded(lambda: result.return_value) == expected


def test_broken_connection_is_opened_again_and_no_text_is_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "JOB_POLL_S", 0.0)
    written: list[str] = []
    away = requests.exceptions.ConnectionError("away")
    connections = [["one\n", "tw", RuntimeError("closed")], [away], ["one\ntwo\n", "three\n"]]
    assert follow_job(Cluster(*connections), JOB, written.append) == 0  # type: ignore[arg-type]
    assert "".join(written) == "one\ntwo\nthree\n"


def test_unreachable_cluster_ends_with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "JOB_POLL_S", 0.0)
    monkeypatch.setattr(submit, "UNREACHABLE_S", 0.05)
    cluster = Cluster(*[[OSError("away")]] * 10**6)
    monkeypatch.setattr(cluster, "get_job_info", lambda job: (_ for _ in ()).throw(OSError("away")))
    with pytest.raises(StageFailed, match=rf"has not answered .*\n.*follow it: .*--address {HERE} quickstart-1"):
        follow_job(cluster, JOB, lambda text: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stopped", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_ctrl_c_leaves_the_job_and_prints_how_to_stop_it(cluster: Cluster, stopped: BaseException, code: int) -> None:
    cluster.texts = [["one\n", stopped]]
    before = signal.getsignal(signal.SIGINT)
    result = run_submit(QUICKSTART, SHARED, "--address", HERE)
    assert result.return_value == code
    job = cluster.sent["submission_id"]
    assert f"job logs --follow --address {HERE} {job}" in result.output
    assert f"job stop --address {HERE} {job}" in result.output
    assert signal.getsignal(signal.SIGINT) is before


def test_detached_job_is_not_followed(cluster: Cluster) -> None:
    result = run_submit(QUICKSTART, SHARED, "--address", HERE, "--detach")
    assert result.return_value == 0
    assert "the job continues" in result.output
    assert len(cluster.texts) == 1


def test_job_is_sent_again_to_a_cluster_without_agents(cluster: Cluster) -> None:
    cluster.refusals = [RuntimeError("Request failed with status code 500: No available agent to submit job")]
    assert run_submit(QUICKSTART, SHARED, "--address", HERE).return_value == 0
    cluster.refusals = [RuntimeError("Request failed with status code 400: no")]
    assert isinstance(run_submit(QUICKSTART, SHARED, "--address", HERE).exception, StageFailed)


@pytest.mark.parametrize(
    ("error", "mode", "message"),
    [
        (AuthenticationError("401"), "disabled", "requires a token"),
        (AuthenticationError("403"), "token", "refuses the token of this machine"),
        (ConnectionError("Failed to connect"), "token", "does not answer as a Ray cluster: Failed to connect"),
        (
            RuntimeError("Version check returned 404. x"),
            "token",
            "does not answer as a Ray cluster: Version check returned 404",
        ),
    ],
)
def test_refused_connection_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, mode: str, message: str
) -> None:
    def refuse(address: str) -> None:
        raise error

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(UserError, match=message) as raised:
        submit.connect_to_cluster(HERE)
    assert len(str(raised.value).splitlines()) == 1
    assert os.environ["RAY_API_SERVER_ADDRESS"] == HERE


@pytest.mark.parametrize("named", [True, False])
def test_token_file_of_ray_becomes_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool) -> None:
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
