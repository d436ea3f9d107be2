"""The report of a search: what it tells, that it repeats what was done, and how it looks in a true browser."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from firstlight.pipeline.config.recipe import load, split_override
from firstlight.pipeline.report.run_report import RECIPE
from firstlight.pipeline.search import report
from firstlight.pipeline.search.ledger import Ledger, Trial
from firstlight.pipeline.search.report import Searched, at_an_end, overrides, write
from firstlight.pipeline.search.search import best_of
from firstlight.pipeline.search.space import read
from tests.support import recipes
from tests.support.browser import chromium, look
from tests.support.searches import LR, PERIOD, done, many, plan

BROWSER = pytest.mark.skipif(chromium() is None, reason="there is no chromium to open pages with")
TWO = [{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}]
HOSTILE = "<script>alert(1)</script> " + "x" * 300


def searched(folder: Path, count: int = 24, seeds: int = 2, **changes: Any) -> Searched:
    """A search of which `count` trials have ended that were never run, as its own folder has it."""
    wanted = plan(folder, **{"objectives": TWO, "trials": 24, "description": HOSTILE[:26], **changes})
    store = recipes.store(folder / "runs")
    ledger = Ledger(folder / "runs" / wanted.search.name / wanted.fingerprint(), store.hash)
    ledger.trials = many(wanted.search, count, seeds)
    best = best_of(ledger.trials, wanted.search.objectives[0])
    return Searched(
        wanted,
        ledger,
        store,
        "0123456789abcdef",
        "sqlite:///runs/mlflow.db",
        best,
        promoted="models:/digits@best" if best else None,
    )


def words(file: Path) -> str:
    """What a reader sees of a page."""
    text = file.read_text("utf-8")
    return " ".join(
        re.sub(r"<[^>]*>", " ", text[text.index("<body>") :]).replace("&#39;", "'").replace("&#34;", '"').split()
    )


def test_it_tells_what_was_searched_and_what_was_best(tmp_path: Path) -> None:
    found = searched(tmp_path)
    text = words(write(found))
    best = found.best
    assert best is not None
    assert (
        f"Trial {best.name} is the best of the {len(found.done)} that came to their end: evaluate.knn {best.means[0]:.4g} ± 0.0071"
        in text
    )
    for told in (
        "loguniform 0.01 to 1",
        "choice 1, 2, 3",
        "optuna, seed 0",
        "models:/digits@best",
        found.store.hash,
        "run 0123456789abcdef",
    ):
        assert told in text, told
    for trial in found.ledger.trials:
        assert f"{trial.name} {trial.state}" in text
    assert "The Pareto set" in text
    assert "behind others at 1 epochs: watch_knn 0.5" in text
    assert "finished: 24 trials" in text
    failed = sum(trial.state == "failed" for trial in found.ledger.trials)
    assert f"{failed} trials failed: behind others" in text


def test_the_pictures_of_the_search_are_inside(tmp_path: Path) -> None:
    found = searched(tmp_path, objectives=[{"measure": "evaluate.knn"}])
    page = write(found).read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert all(
        title in page
        for title in ("each trial and the best so far", "What decides", "All trials through their settings")
    )


def test_all_failed_and_none_begun(tmp_path: Path) -> None:
    found = searched(tmp_path, 0)
    found.ledger.trials = [Trial(k, {LR: 0.1, PERIOD: 1}, state="failed", reason=HOSTILE) for k in range(3)]
    file = write(replace(found, error="none of the 3 trials has come to its end"))
    assert "<script" not in file.read_text("utf-8")
    text = words(file)
    assert "stopped: 3 of 24 trials ended" in text
    assert "none of the 3 trials has come to its end" in text
    assert "3 trials failed: " in text
    found.ledger.trials = []
    assert "No trial has come to its end." in words(write(found))


def test_the_files_beside_it_are_the_search_and_its_recipe(tmp_path: Path) -> None:
    found = searched(tmp_path)
    folder = write(found).parent
    again = read(folder / report.SEARCH)
    assert again.search == found.plan.search.model_copy(update={"recipe": RECIPE})
    assert again.fingerprint() == found.plan.fingerprint(), "it goes on with this search"
    assert load(folder / RECIPE) == found.plan.whole({})


@pytest.mark.parametrize("values", [{LR: 1.5e-05, PERIOD: 3}, {LR: 0.30000000000000004, PERIOD: 1}])
def test_the_words_of_the_best_setting_are_that_setting(tmp_path: Path, values: dict[str, Any]) -> None:
    found = searched(tmp_path, space={LR: {"loguniform": [1e-05, 1.0]}, PERIOD: {"choice": [1, 2, 3]}})
    folder = write(found).parent
    words = tuple(word for told in overrides(values) for word in shlex.split(told))
    assert load(folder / RECIPE, words) == found.plan.whole(values)


def test_values_that_are_no_numbers_come_back_from_a_command_line() -> None:
    values = {"a.b": "it's", "a.c": [1, 2], "a.d": None, "a.e": True, "a.f": "true"}
    back = {
        ".".join(key): value
        for key, value in (split_override(word) for told in overrides(values) for word in shlex.split(told))
    }
    assert back == values


@pytest.mark.parametrize(
    ("dimension", "value", "end"),
    [
        ({"loguniform": [0.01, 1.0]}, 0.99, "upper"),
        ({"loguniform": [0.01, 1.0]}, 0.0101, "lower"),
        ({"loguniform": [0.01, 1.0]}, 0.1, None),
        ({"loguniform": [0.001, 1.0]}, 0.02, None),
        ({"uniform": [0.1, 1.0]}, 0.12, "lower"),
        ({"randint": [1, 9]}, 9, "upper"),
        ({"choice": [3, 1, 2]}, 1, "lower"),
        ({"choice": [3, 1, 2]}, 2, None),
        ({"choice": [1, 2]}, 2, None),
    ],
)
def test_a_best_value_at_an_end_is_told(
    tmp_path: Path, dimension: dict[str, Any], value: float, end: str | None
) -> None:
    key = PERIOD if isinstance(value, int) else LR
    found = searched(tmp_path, 0, space={key: dimension})
    lines = list(at_an_end(replace(found, best=done(0, {key: value}, 0.5, 0.5))))
    assert [f"at the {end} end" in line for line in lines] == ([True] if end else [])


@BROWSER
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light"), (360, "light"), (1280, "dark")])
def test_in_a_browser(shown: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    seen = look(shown, width, scheme)
    assert seen.complaints == []
    assert seen.requests == []
    found = seen.measured
    assert found["texts"] > 200
    assert found["images"] == 6
    assert found["faint"] == []
    assert (
        found["overflow"],
        found["broken"],
        found["nameless"],
        found["small"],
        found["headless"],
        found["scripts"],
    ) == (0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all there can be, and an endless word in a reason."""
    found = searched(tmp_path_factory.mktemp("page"), overrides={"stages.pretrain.epochs": 1})
    next(trial for trial in found.ledger.trials if trial.state == "failed").reason = HOSTILE
    return write(found)
