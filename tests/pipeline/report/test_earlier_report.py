"""The report of other settings under the same name."""

from pathlib import Path

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.earlier_report import keep_earlier_report
from firstlight.pipeline.report.page_parts import RECIPE_FILE, REPORT_FILE
from tests.support import recipes


def _write_report(folder: Path, recipe: Recipe) -> None:
    folder.mkdir(exist_ok=True)
    (folder / REPORT_FILE).write_text("earlier")
    (folder / RECIPE_FILE).write_text(yaml_reader.dump_yaml(recipe.dump()))


def test_report_of_other_settings_is_kept_and_the_settings_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    _write_report(folder, recipes.recipe(tmp_path))
    changed = recipes.recipe(tmp_path, seeds=[0, 1, 2], stages__evaluate__knn_k=3)
    (note,) = keep_earlier_report(folder, changed)
    assert "stages.evaluate.knn_k: 5 -> 3" in note
    assert "seeds: [0] -> [0, 1, 2]" in note
    (kept,) = folder.glob("report-*.html")
    assert str(kept) in note
    assert kept.read_text() == "earlier"
    assert parse_recipe(yaml_reader.read_yaml(kept.with_suffix(".yaml"))).seeds == (0,)
    assert keep_earlier_report(folder, changed) == [], "it is told once"


def test_same_settings_keep_their_report(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    _write_report(folder, recipes.recipe(tmp_path))
    assert keep_earlier_report(folder, recipes.recipe(tmp_path, scale__threads=2)) == []
    assert (folder / REPORT_FILE).exists()


def test_added_and_removed_stages_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    _write_report(folder, recipes.recipe(tmp_path))
    (note,) = keep_earlier_report(folder, recipes.recipe(tmp_path, stages__retrieve={"kind": "retrieve"}))
    assert "stages.retrieve: none -> ..." in note


def test_unreadable_recipe_of_an_earlier_run_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    _write_report(folder, recipes.recipe(tmp_path))
    (folder / RECIPE_FILE).write_text("a: [")
    assert keep_earlier_report(folder, recipes.recipe(tmp_path)) == []
