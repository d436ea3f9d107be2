"""Weights & Biases stays offline and asks for nothing, unless the environment says otherwise."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.loggers import wandb as module
from firstlight.pipeline.tracking.loggers.contract import LoggedNumber, LoggedRun
from firstlight.pipeline.tracking.loggers.registry import check_loggers
from tests.support.paths import ROOT


class FakeRun:
    """A run of W&B that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, Any], int]] = []
        self.code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "trainer/global_step")

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((row, step))

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """W&B as a package whose `init` keeps its arguments, with an environment that says nothing about it."""
    for key in [*module.WANDB_DEFAULTS, module.FOLDER_VARIABLE, module.PROJECT_VARIABLE, "WANDB_API_KEY"]:
        # The variables are set first, so that what the logger sets is removed after the test.
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    fake = SimpleNamespace(given={}, run=FakeRun(), logged_in=False)

    def init(**given: Any) -> FakeRun:
        fake.given, fake.mode = given, os.environ["WANDB_MODE"]
        return fake.run

    def login(prompt: bool, verify: bool) -> bool:
        assert not prompt
        assert not verify
        return bool(fake.logged_in)

    fake.init, fake.login, fake.Settings = init, login, lambda **words: words
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_run_is_offline_and_has_the_id_of_mlflow(package: SimpleNamespace, tmp_path: Any) -> None:
    run = LoggedRun("ab12", "pretrain seed 0", "small", "digits", tmp_path, "pretrain", tags={"firstlight.kind": "x"})
    logger = module.WandbLogger(run)
    assert package.mode == "offline"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    given = {key: package.given[key] for key in ("id", "name", "group", "project", "job_type", "dir")}
    assert given == {
        "id": "ab12",
        "name": "pretrain seed 0",
        "group": "small",
        "project": "digits",
        "job_type": "pretrain",
        "dir": tmp_path,
    }
    logger.log_numbers([LoggedNumber("loss", 2, 0.5, 1.0), LoggedNumber("lr", 2, 0.1, 1.0)])
    logger.log_numbers([LoggedNumber("score", 0, 0.25, 1.0), LoggedNumber("score", 0, 0.5, 2.0)])
    assert package.run.rows == [
        ({"trainer/global_step": 2, "loss": 0.5, "lr": 0.1}, 0),
        ({"trainer/global_step": 0, "score": 0.25}, 1),
        ({"trainer/global_step": 0, "score": 0.5}, 2),
    ]
    logger.finish("KILLED")
    assert package.run.code == 1


def test_environment_of_the_user_counts(package: SimpleNamespace, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    module.WandbLogger(LoggedRun("ab12", "a", "small", "digits", tmp_path))
    assert package.mode == "online"
    assert package.given["project"] == "mine"
    assert package.given["dir"] == tmp_path / "elsewhere"


def test_online_without_a_key_ends_in_one_line_instead_of_a_prompt(
    package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module.WandbLogger.find_problem() == ""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("firstlight.pipeline.tracking.loggers.registry.find_spec", lambda package: object())
    with pytest.raises(UserError) as error:
        check_loggers(["wandb"])
    assert str(error.value) == (
        "tracking.loggers: 'wandb' cannot be used: WANDB_MODE is 'online', and there is no API key; "
        "set WANDB_API_KEY, or WANDB_MODE=offline; valid here: tensorboard"
    )
    package.logged_in = True
    check_loggers(["wandb"])


def test_only_the_modules_of_loggers_import_their_packages() -> None:
    for package in ("tensorboard", "wandb"):
        users = {
            file.relative_to(ROOT).as_posix()
            for folder in ("pipeline", "tasks")
            for file in (ROOT / folder).rglob("*.py")
            if f"import {package}\n" in (text := file.read_text()) or f"from {package}" in text
        }
        assert users <= {f"pipeline/tracking/loggers/{name}.py" for name in (package, f"{package}_files")}
        assert users
