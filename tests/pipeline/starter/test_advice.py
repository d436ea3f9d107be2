"""Recommended methods: they are those of the file, the guide shows them, and they can be taken."""

from io import StringIO

from rich.console import Console

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.catalog import list_recipes
from firstlight.pipeline.config.conf_files import STARTER_FILE
from firstlight.pipeline.starter.advice import build_advice_table, read_advice
from firstlight.tasks.pretrain import METHODS
from tests.support.paths import ROOT


def test_guide_has_the_table_of_recommendations() -> None:
    guide = (ROOT / "docs/guide.md").read_text("utf-8")
    rows = "\n".join(f"| {advice.case} | {advice.take} | {advice.because} |" for advice in read_advice())
    assert f"| you have | take | measured |\n|---|---|---|\n{rows}\n" in guide


def test_names_in_the_advice_exist() -> None:
    recipes = {entry.name for entry in list_recipes()}
    study = yaml_reader.read_yaml(ROOT / "conf/recipe/study.yaml")["stages"]
    for advice in read_advice():
        named = [word for k, word in enumerate(advice.take.split("`")) if k % 2]
        assert named, advice.take
        for word in named:
            assert word in recipes | METHODS.keys() | study.keys() | {"decoupled: true"}, word


def test_terminal_shows_every_word_of_it() -> None:
    console = Console(file=StringIO(), width=200)
    console.print(build_advice_table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for advice in read_advice():
        assert all(word in shown for word in advice.because.replace("`", "").split())


def test_default_method_is_one_of_the_study_that_needs_no_labels() -> None:
    starter = yaml_reader.read_yaml(STARTER_FILE)
    stage = yaml_reader.read_yaml(ROOT / f"conf/recipe/{starter['recipe']}.yaml")["stages"][starter["method"]]
    assert stage["kind"] == "pretrain"
    assert "labels_per_class" not in stage
