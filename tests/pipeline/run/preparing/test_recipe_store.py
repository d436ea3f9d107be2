"""The store of a recipe is written once, with lines about what was read and how many images it has."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.pipeline.run.preparing.recipe_store import print_lines, write_recipe_store
from tests.support import recipes


def test_store_is_described_when_it_is_written(tmp_path: Path) -> None:
    recipe, out = recipes.recipe(tmp_path), io.StringIO()
    console = Console(file=out)
    first = write_recipe_store(recipe, find_recipe_side(recipe), None, console, lambda: False)
    again = write_recipe_store(recipe, find_recipe_side(recipe), None, console, lambda: False)
    assert (first.was_described, again.was_described) == (True, False)
    assert first.store.hash == again.store.hash
    assert sum(line.startswith("prepare: ") for line in out.getvalue().splitlines()) == 2
    assert first.store.path.parent == tmp_path / "stores"


def test_check_ends_the_writing(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("enough")

    recipe, out = recipes.recipe(tmp_path), io.StringIO()
    with pytest.raises(KeyError, match="enough"):
        write_recipe_store(recipe, None, None, Console(file=out), lambda: False, check=fail)
    assert "prepare: " not in out.getvalue()


def test_lines_are_printed_as_they_are(tmp_path: Path) -> None:
    out = io.StringIO()
    print_lines(Console(file=out, width=20), ["[a] long line of many words", "b"])
    assert out.getvalue() == "  [a] long line of many words\n  b\n"
