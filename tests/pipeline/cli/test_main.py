"""The command line as a whole: its help, its recipe commands, its exit codes."""

import errno
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

from firstlight.pipeline.cli.main import FIRST_RUN_GOALS, cli, main, run_guarded
from firstlight.pipeline.errors import StageFailed, StopTraining, Terminated, UserError
from firstlight.pipeline.stages.sections.known import KNOWN_SECTIONS
from firstlight.pipeline.tracking.retry import TrackingUnavailable
from tests.support.folders_of_noise import write_noise_folder
from tests.support.own_training import know_own_training
from tests.support.paths import ROOT

LOCKED = "error: tracking.uri: MLflow cannot be used: database is locked; run it again"
COMMANDS = {
    "init",
    "config",
    "look",
    "recipes",
    "search",
    "runs",
    "show",
    "compare",
    "promote",
    "delete",
    "repeat",
    "ui",
    "doctor",
    "submit",
    "predict",
    "push",
}
CONTEXT = click.Context(cli)
RECIPE_COMMANDS = {"run", "prepare", *(get_args(one.model_fields["kind"].annotation)[0] for one in KNOWN_SECTIONS)}
FIRST_RUN_FLAGS = {"--data", "--out", "--model", "--weights", "--method", "--epochs", "--minutes"}
# Options and what they are for; a script may use them, so they stay.
OPTIONS = {
    **{name: {"--smoke", "-v", "--verbose"} for name in RECIPE_COMMANDS},
    **dict.fromkeys(FIRST_RUN_GOALS, {"--smoke", "-v", "--verbose"} | FIRST_RUN_FLAGS),
    "init": {"--out", "--model", "--weights", "--method", "--epochs"},
    "look": {"--out", "--model", "--weights", "--similarity", "--diverse", "--images", "--export"},
    "config": {"--smoke"},
    "recipes": set(),
    "search": {"-v", "--verbose"},
    "runs": {"-n", "--name", "--limit"},
    "show": set(),
    "compare": {"--out"},
    "promote": {"--name", "--alias"},
    "delete": {"-y", "--yes", "--force"},
    "repeat": {"--from", "--exact", "-v", "--verbose"},
    "ui": {"--port"},
    "push": {"--private", "--revision", "--dry-run", "--from"},
    "predict": {
        *("--out", "--force", "--batch-size", "--top", "--split"),
        *("--workers", "--gpus-per-worker", "--from", "-v", "--verbose"),
    },
    "doctor": {"--ray"},
    "submit": {"--address", "--installed", "--detach", "--smoke", "-v", "--verbose"},
}


def raising(error: BaseException) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def find_command(name: str) -> click.Command:
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    return command


def test_new_kind_of_stage_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr("firstlight.pipeline.cli.main._run_and_report", lambda *arguments: calls.append(arguments))
    with know_own_training():
        assert "own_training  Run the trainings of an own kind." in CliRunner().invoke(cli, ["--help"]).output
        CliRunner().invoke(cli, ["own_training", "r.yaml", "seeds=[1]"], catch_exceptions=False)
    assert calls == [(Path("r.yaml"), ("seeds=[1]",), "own_training", False)]
    assert CliRunner().invoke(cli, ["own_training", "r.yaml"]).exit_code == 2


def test_commands_and_their_options_are_these() -> None:
    assert set(cli.list_commands(CONTEXT)) == COMMANDS | RECIPE_COMMANDS
    for name in cli.list_commands(CONTEXT):
        command = find_command(name)
        found = {flag for option in command.params if isinstance(option, click.Option) for flag in option.opts}
        assert found == OPTIONS[name], name


def test_help_names_every_command_in_a_whole_line() -> None:
    lines = CliRunner().invoke(cli, ["--help"], terminal_width=80).output.split("Commands:\n")[1].splitlines()
    assert {line.split()[0] for line in lines} == set(cli.list_commands(CONTEXT))
    assert not [line for line in lines if line.endswith("...")]


@pytest.mark.parametrize("name", sorted(COMMANDS | RECIPE_COMMANDS))
def test_each_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    text = result.output.split("\n\n")[1].strip()
    assert text.endswith(".")
    assert text[0].isupper()
    for option in find_command(name).params:
        assert not isinstance(option, click.Option) or (option.help or "").endswith("."), option.name


def test_help_needs_neither_torch_nor_mlflow() -> None:
    script = (
        "import sys, firstlight.pipeline.cli.main; print({'torch', 'mlflow', 'ray', 'pydantic'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert answer.stdout == "set()\n", answer.stderr


def test_recipe_command_runs_the_stages_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr("firstlight.pipeline.cli.main._run_and_report", lambda *arguments: calls.append(arguments))
    for command in ("run", "pretrain"):
        CliRunner().invoke(cli, [command, "r.yaml", "scale.workers=2", "--smoke"], catch_exceptions=False)
    assert calls == [
        (Path("r.yaml"), ("scale.workers=2",), None, True),
        (Path("r.yaml"), ("scale.workers=2",), "pretrain", True),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "RECIPE: is missing; valid: a recipe, or --data and --out for your own images"),
        (["pretrain", "r.yaml", "--epochs", "3"], "--epochs: needs --data, your own images; a recipe has it as a key"),
        (["embed", "--data", "x"], "--out: is missing: the folder for the recipe and all results"),
        (
            ["embed", "r.yaml", "--data", "x", "--out", "y"],
            "r.yaml: cannot be combined with --data, which writes the recipe; valid: KEY=VALUE",
        ),
        (
            ["embed", "--smoke", "--data", "x", "--out", "y"],
            "--smoke: cannot be combined with --data; valid: --epochs 1",
        ),
        (
            ["export", "--data", "x", "--out", "y"],
            "x: does not exist; valid: a folder of images, or a file that lists them",
        ),
    ],
)
def test_mistake_in_a_first_run_is_a_one_line_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert str(raised.value) == message
    assert not list(tmp_path.iterdir())


def test_first_run_writes_its_recipe_and_runs_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr("firstlight.pipeline.cli.main._run_and_report", lambda *arguments, **_: calls.append(arguments))
    write_noise_folder(tmp_path / "images", {"a": 9, "b": 9}, (32, 32))
    asked = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--epochs", "2"]
    result = CliRunner().invoke(cli, ["finetune", *asked, "seeds=[4]"], catch_exceptions=False)
    assert calls == [(tmp_path / "out" / "recipe.yaml", ("seeds=[4]",), None)]
    assert result.output.splitlines()[-1] == f"recipe: {tmp_path}/out/recipe.yaml"


def test_mistake_in_a_recipe_is_code_2_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(ROOT / "conf/recipe/quickstart.yaml")
    monkeypatch.setattr(sys, "argv", ["firstlight", "config", recipe, "scale.workrs=2"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
        assert signal.getsignal(signal.SIGTERM) is not before
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: scale.workrs: unknown key")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("a: one\nb: two"), 2, ["error: a: one", "error: b: two"]),
        (StageFailed("rank 1\nfailed"), 1, ["error: rank 1 failed"]),
        (StopTraining("not finite"), 1, ["error: not finite"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            ["error: /x/y: No space left on device; what was finished is kept: run the same command again to continue"],
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            1,
            ["error: Read-only file system; what was finished is kept: run the same command again to continue"],
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"),
            1,
            ["error: /x/y: No such file or directory; was the storage deleted, moved or unmounted during the run?"],
        ),
        (TrackingUnavailable("database is locked"), 1, [LOCKED]),
        (MlflowException("(sqlite3.OperationalError) database is locked"), 1, [LOCKED]),
        (UserError("/x/a\x1b[2Jb\u202ec: is damaged"), 2, [r"error: /x/a\x1b[2Jb\u202ec: is damaged"]),
        (UserError("/x/a\u2028b\x0bc: is damaged"), 2, [r"error: /x/a\u2028b\x0bc: is damaged"]),
        (KeyboardInterrupt(), 130, ["stopped; run the same command again to continue"]),
        (Terminated(), 143, ["stopped; run the same command again to continue"]),
        (caused(click.Abort(), KeyboardInterrupt()), 130, ["stopped; run the same command again to continue"]),
        (caused(click.Abort(), Terminated()), 143, ["stopped; run the same command again to continue"]),
        (click.UsageError("no such option"), 2, ["Error: no such option"]),
    ],
)
def test_failures_are_lines_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, lines: list[str]
) -> None:
    assert run_guarded(raising(error)) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_result_of_a_command_is_the_exit_code() -> None:
    assert run_guarded(lambda: None) == 0
    assert run_guarded(lambda: 7) == 7


def test_denied_file_is_one_line_with_its_owner(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    owner = pwd.getpwuid(os.getuid()).pw_name
    assert run_guarded(raising(PermissionError(errno.EACCES, "Permission denied", str(tmp_path)))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: cannot be written: it belongs to {owner}; valid: ")


def test_unknown_errors_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="denied"):
        run_guarded(raising(OSError(errno.EACCES, "denied")))
    with pytest.raises(ZeroDivisionError):
        run_guarded(raising(ZeroDivisionError()))


@pytest.mark.parametrize("error", [StageFailed("rank 1"), OSError(errno.ENOSPC, "full")])
def test_verbose_shows_the_traceback_of_a_failure(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "FIRSTLIGHT_VERBOSE": "1"})
    with pytest.raises(type(error)):
        run_guarded(raising(error))
