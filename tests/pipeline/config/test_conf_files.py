"""Recipes and searches by their names."""

from pathlib import Path

import pytest

from firstlight.pipeline.config.conf_files import CONF_FOLDER, find_conf_file, find_conf_folder
from firstlight.pipeline.config.load import STAGE_CONF_GROUPS, load_recipe
from firstlight.pipeline.config.schemas.entries import load_entries
from firstlight.pipeline.config.yaml_reader import read_yaml
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.search.plan import load_plan


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "conf/recipe/quickstart.yaml"])
def test_shipped_recipe_is_found_by_its_name_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_conf_file(Path(name), "recipe") == CONF_FOLDER / "recipe" / "quickstart.yaml"
    assert load_recipe(Path(name)).name == "quickstart"


def test_names_have_folders_and_searches_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_conf_file(Path("nat/table3"), "recipe") == CONF_FOLDER / "recipe" / "nat" / "table3.yaml"
    assert load_plan(Path("quickstart")).search.recipe == "quickstart.yaml"


def test_file_of_this_folder_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("name: mine")
    assert find_conf_file(Path("quickstart"), "recipe") == Path("quickstart")
    assert find_conf_folder(Path("quickstart")) == CONF_FOLDER


def test_unknown_name_gets_similar_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^quikstart: no such file, and no recipe .*; did you mean 'quickstart'\?$"):
        load_recipe(Path("quikstart"))
    with pytest.raises(UserError, match=r"^zzz: .*`firstlight recipes` lists the recipes$"):
        load_recipe(Path("zzz"))


def test_search_given_as_a_recipe_and_the_reverse_are_one_line() -> None:
    search = CONF_FOLDER / "search" / "quickstart.yaml"
    with pytest.raises(UserError, match=r"is a search of settings, not a recipe: firstlight search .*quickstart.yaml$"):
        load_recipe(search)
    with pytest.raises(UserError, match=r"is a recipe, not a search of settings: firstlight run .*quickstart.yaml$"):
        load_plan(CONF_FOLDER / "recipe" / "quickstart.yaml")


def test_stage_is_added_on_the_command_line() -> None:
    recipe = load_recipe(Path("quickstart"), ("stages.retrieve={}", "stages.last={kind: evaluate, knn_k: 7}"))
    assert list(recipe.stages)[-2:] == ["retrieve", "last"]
    assert recipe.stages["last"].model_dump()["knn_k"] == 7


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stages.retrieve.k=5", "stages.retrieve={} adds it"),
        ("stages.evalute={}", "did you mean 'evaluate'?"),
        ("stages.mine={kind: nothing}", "stages.mine={kind: ...} adds it"),
    ],
)
def test_key_of_a_stage_that_is_missing_names_how_to_add_it(override: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(Path("quickstart"), (override,))
    assert "no such stage in this recipe" in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize("group", STAGE_CONF_GROUPS)
def test_conf_file_repeats_no_default_of_its_class(group: str) -> None:
    """The default of a key stands in the constructor alone. A preset has the keys that differ from it."""
    files = sorted((CONF_FOLDER / group).glob("*.yaml"))
    entries = load_entries()[f"{group}s"]
    assert {read_yaml(file)["name"] for file in files} == entries.keys()
    for file in files:
        written = read_yaml(file)
        parameters = entries[written.pop("name")]["parameters"]
        assert written.keys() <= parameters.keys(), file
        defaults = {key: parameter["default"] for key, parameter in parameters.items() if "default" in parameter}
        assert [key for key in written.keys() & defaults.keys() if written[key] == defaults[key]] == [], file
