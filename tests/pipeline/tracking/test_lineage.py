"""What is read from MLflow, and how its runs are related."""

import json
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.lineage import Lineage, read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support.mlflow_runs import STORE, Past, chain


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Past, dict[str, str]]:
    return chain(tmp_path_factory.mktemp("past"))


@pytest.fixture
def runs(made: tuple[Past, dict[str, str]]) -> dict[str, str]:
    return made[1]


@pytest.fixture
def lineage(made: tuple[Past, dict[str, str]]) -> Lineage:
    return read_lineage(parse_location([f"storage={made[0].storage}"]))[0]


def test_what_hangs_together(lineage: Lineage, runs: dict[str, str]) -> None:
    first = lineage.runs[runs["first"]]
    assert [run.name for run in lineage.list_stages(first)] == [
        "prepare",
        "pretrain seed 0",
        "evaluate seed 0",
        "pretrain seed 1",
        "evaluate seed 1",
    ]
    pretrained = lineage.runs[runs["pretrain0"]]
    assert [run.id for run in lineage.list_consumers(pretrained)] == [runs["evaluate0"], runs["other"]]
    assert lineage.find_source(lineage.runs[runs["other"]]) == pretrained
    assert [version.reference for version in lineage.list_models(pretrained)] == ["models:/digits-nat@current"]
    assert lineage.encoder_reference(lineage.runs[runs["pretrain1"]]) == f"runs:/{runs['pretrain1'][:8]}/encoder"
    assert {run.store for run in lineage.runs.values()} == {STORE}
    assert [run.name for run in lineage.list_roots()] == ["second", "first"]


def test_stages_that_an_earlier_run_has_made_belong_to_a_recipe_too(tmp_path: Path) -> None:
    past, runs = chain(tmp_path)
    past.tracking.log_stage_runs(runs["second"], "pretrain", [runs["pretrain0"]])
    found, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert [run.name for run in found.list_stages(found.runs[runs["second"]])] == [
        "prepare",
        "pretrain seed 0",
        "evaluate seed 0",
    ]


@pytest.mark.parametrize("word", ["id", "begun", "models:/digits-nat@current", "models:/digits-nat/1", "reference"])
def test_a_run_is_found_by(lineage: Lineage, runs: dict[str, str], word: str) -> None:
    run_id = runs["pretrain0"]
    words = {"id": run_id, "begun": run_id[:10], "reference": f"runs:/{run_id[:8]}/encoder"}
    assert lineage.find_run(words.get(word, word)).id == run_id
    assert lineage.find_run("second").id == runs["second"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("frist", "run: 'frist' is no id, no beginning of one and no recipe's name in .*; did you mean 'first'"),
        (
            "models:/digits-nat@best",
            "run: 'models:/digits-nat@best' is not in .*; did you mean 'models:/digits-nat@current'",
        ),
        ("", "run: '' is no id"),
    ],
)
def test_a_run_that_is_not_there(lineage: Lineage, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lineage.find_run(word)


def test_nothing_was_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking.uri: 'sqlite:.* is not there: nothing was run in storage "):
        read_lineage(parse_location([f"storage={tmp_path}"]))
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_an_experiment_that_is_not_there(made: tuple[Past, dict[str, str]]) -> None:
    with pytest.raises(UserError, match=r"^tracking.experiment: 'other' is not in sqlite"):
        read_lineage(parse_location([f"storage={made[0].storage}", "tracking.experiment=other"]))


def test_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
