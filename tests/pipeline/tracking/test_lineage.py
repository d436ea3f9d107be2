"""Runs that are read from MLflow, and the relations between them."""

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


def test_relations_between_runs_are_found(lineage: Lineage, runs: dict[str, str]) -> None:
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


def test_stages_made_by_an_earlier_run_belong_to_a_recipe(tmp_path: Path) -> None:
    past, runs = chain(tmp_path)
    past.tracking.log_stage_runs(runs["second"], "pretrain", [runs["pretrain0"]])
    found, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert [run.name for run in found.list_stages(found.runs[runs["second"]])] == [
        "prepare",
        "pretrain seed 0",
        "evaluate seed 0",
    ]


@pytest.mark.parametrize("word", ["id", "begun", "models:/digits-nat@current", "models:/digits-nat/1", "reference"])
def test_run_is_found_by_id_reference_or_name(lineage: Lineage, runs: dict[str, str], word: str) -> None:
    run_id = runs["pretrain0"]
    words = {"id": run_id, "begun": run_id[:10], "reference": f"runs:/{run_id[:8]}/encoder"}
    assert lineage.find_run(words.get(word, word)).id == run_id
    assert lineage.find_run("second").id == runs["second"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "frist",
            "run: 'frist' is neither the beginning of an id nor the name of a recipe in .*; did you mean 'first'",
        ),
        (
            "models:/digits-nat@best",
            "run: 'models:/digits-nat@best' is not in .*; did you mean 'models:/digits-nat@current'",
        ),
        ("", "run: '' is neither the beginning of an id"),
    ],
)
def test_unknown_run_names_the_nearest_known_one(lineage: Lineage, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lineage.find_run(word)


def test_missing_database_raises_and_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking.uri: 'sqlite:.* does not exist: nothing was run in storage "):
        read_lineage(parse_location([f"storage={tmp_path}"]))
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_missing_experiment_raises(made: tuple[Past, dict[str, str]]) -> None:
    with pytest.raises(UserError, match=r"^tracking.experiment: 'other' is not in sqlite"):
        read_lineage(parse_location([f"storage={made[0].storage}", "tracking.experiment=other"]))
