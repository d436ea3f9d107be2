"""Locations of runs, from recipes and from the command line."""

import json
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.location import parse_location


def test_location_comes_from_recipe_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_location([]).uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"name": "x", "storage": "there", "tracking": {"uri": "http://host:5000"}, "stages": {}})
    )
    assert parse_location([str(recipe)]) == parse_location(["storage=there", "tracking.uri=http://host:5000"])
    assert parse_location([str(recipe), "storage=here"]).storage == tmp_path / "here"
    for word in (["storag=x"], ["storage=3"], ["a.yaml", "b.yaml"]):
        with pytest.raises(UserError):
            parse_location(word)
