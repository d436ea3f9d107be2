"""Names of loggers: unknown ones, missing packages, and those of other packages."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search.checks import check_search
from firstlight.pipeline.tracking.loggers import registry
from firstlight.pipeline.tracking.loggers.tensorboard import TensorBoardLogger
from firstlight.tasks.extensions.registry import Registry, find_entry_points
from tests.support import recipes, searches
from tests.support.extension_package import write_package
from tests.support.recipe_runs import QUIET


def test_unknown_logger_ends_in_one_line_before_any_work(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, tracking__loggers=["tensorbord"])
    wanted = "tracking.loggers: 'tensorbord' is no logger; did you mean 'tensorboard'? (valid: tensorboard, wandb)"
    plan = searches.make_plan(tmp_path, 'tracking.loggers=["tensorbord"]')
    for check in (lambda: run_recipe(recipe, QUIET), lambda: check_search(plan, recipe)):
        with pytest.raises(UserError) as error:
            check()
        assert str(error.value) == wanted
    assert not (tmp_path / "mlflow.db").exists()


def test_loggers_are_checked_once_in_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(TensorBoardLogger, "find_problem", classmethod(lambda cls: asked.append("now") or ""))
    recipe = recipes.recipe(tmp_path, tracking__loggers=["tensorboard"])
    run_recipe(recipe, QUIET, "prepare")
    assert len(asked) == 1


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda package: None if package == "wandb" else object())
    registry.check_loggers(["tensorboard"])
    with pytest.raises(UserError) as error:
        registry.check_loggers(["tensorboard", "wandb"])
    assert str(error.value) == (
        "tracking.loggers: 'wandb' needs the package wandb: pip install 'firstlight[wandb]'; valid here: tensorboard"
    )


def test_repeated_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking.loggers: .*must not repeat a logger"):
        recipes.recipe(tmp_path, tracking__loggers=["wandb", "wandb"])


def test_logger_of_an_installed_package_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    find_entry_points.cache_clear()
    importlib.invalidate_caches()
    found: Registry = Registry("loggers", {}, registry.RunLogger)
    monkeypatch.setattr(registry, "LOGGERS", found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            registry.check_loggers(["text"])
        with pytest.raises(UserError, match=r"valid: text$"):
            registry.check_loggers(["x"])
    finally:
        find_entry_points.cache_clear()
        for name in [name for name in sys.modules if name.startswith("loud_extension")]:
            del sys.modules[name]
