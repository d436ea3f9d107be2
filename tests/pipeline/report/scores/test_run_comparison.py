"""Runs side by side: paired gains with verdicts, the settings that differ, and what makes them hard to compare."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.scores.run_comparison import (
    ComparedRun,
    RunComparison,
    build_comparison_view,
    list_cautions,
    read_comparison,
    render_comparison,
)
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.terminal import SafeConsole
from firstlight.pipeline.tracking.lineage import Run, read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support import recipes
from tests.support.recipe_runs import QUIET

KNN = ("evaluate", "kNN", "pretrained")


def made(
    name: str, scores: list[float], seeds: tuple[int, ...] = (0, 1, 2), store: str = "s", **settings: str
) -> ComparedRun:
    run = Run(name * 8, name, "recipe", "FINISHED", 0.0, 1.0, None, store, None, {}, {}, {})
    return ComparedRun(run, seeds, {KNN: np.array(scores)}, settings)


def test_gains_are_paired_by_seed() -> None:
    comparison = RunComparison((made("a", [0.1, 0.3, 0.5], (2, 0, 1)), made("b", [0.36, 0.55, 0.17], (0, 1, 2))))
    gain, verdict = comparison.find_verdicts(1)[KNN]
    assert gain == pytest.approx(100 * (0.06 + 0.05 + 0.07) / 3)
    assert verdict.text == "helps"
    swapped = RunComparison(comparison.runs[::-1]).find_verdicts(1)[KNN]
    assert (swapped[0], swapped[1].text) == (pytest.approx(-gain), "hurts")


def test_only_shared_seeds_are_compared() -> None:
    comparison = RunComparison((made("a", [0.1, 0.2, 0.3]), made("b", [0.4, 0.9], (2, 7))))
    assert comparison.shared_seeds == (2,)
    gain, verdict = comparison.find_verdicts(1)[KNN]
    assert gain == pytest.approx(10.0)
    assert verdict.text == "one seed: no verdict"
    assert list_cautions(comparison) == ["The runs share 1 seed: three are needed for a verdict."]
    assert RunComparison((made("a", [0.1], (0,)), made("b", [0.2], (1,)))).find_verdicts(1) == {}


def test_other_images_are_said() -> None:
    comparison = RunComparison((made("a", [0.1, 0.2, 0.3]), made("b", [0.1, 0.2, 0.3], store="t")))
    assert list_cautions(comparison) == [
        "The runs read different images: a difference of their scores may be one of the images."
    ]


def test_settings_that_differ_are_listed() -> None:
    first, second = made("a", [0.1], (0,), lr="0.1", same="1"), made("b", [0.1], (0,), lr="0.3", same="1", more="x")
    assert RunComparison((first, second)).list_differences() == [("lr", ["0.1", "0.3"]), ("more", ["–", "x"])]


def test_page_escapes_names_of_other_runs() -> None:
    run = made("a", [0.1], (0,))
    named = replace(run, scores={("<b>", "kNN & co", "pretrained"): np.array([0.5])})
    page = render_comparison(RunComparison((named, made("b", [0.2], (0,)))))
    assert "&lt;b&gt;" in page
    assert "kNN &amp; co" in page
    assert "<b>, pretrained" not in page


@pytest.mark.usefixtures("undrawn_figures")
def test_runs_of_recipes_are_read_from_mlflow(tmp_path: Path) -> None:
    for name, rate in (("slow", 0.05), ("fast", 0.5)):
        recipe = recipes.recipe(tmp_path, name=name, stages__pretrain__optimizer__lr=rate)
        run_recipe(recipe.model_copy(update={"stages": {k: recipe.stages[k] for k in ("pretrain", "evaluate")}}), QUIET)
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    comparison = read_comparison(lineage, ["slow", "fast"])
    assert [one.run.name for one in comparison.runs] == ["slow", "fast"]
    assert comparison.is_same_data
    assert comparison.list_differences() == [("stages.pretrain.optimizer.lr", ["0.05", "0.5"])]
    assert {key[2] for key in comparison.keys} == {"pretrained", "random weights"}
    random = [key for key in comparison.keys if key[2] == "random weights"]
    assert random
    verdicts = comparison.find_verdicts(1)
    assert all(verdicts[key][0] == 0.0 for key in random), "the same seed has the same random weights"
    console = SafeConsole(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(build_comparison_view(comparison))
    assert "fast" in console.export_text()
    with pytest.raises(UserError, match=r"^run: 'slow' is named twice, as "):
        read_comparison(lineage, ["slow", "slow"])
    stage = next(run for run in lineage.runs.values() if run.kind == "pretrain")
    with pytest.raises(UserError, match=r"is a run of the kind pretrain; valid: a recipe, by its name or id$"):
        read_comparison(lineage, ["slow", stage.id])
