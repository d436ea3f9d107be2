"""What is read from MLflow, how it hangs together, and how the two commands show it."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from firstlight.pipeline.cli.history import lines, plain, state, table
from firstlight.pipeline.cli.promote import promote
from firstlight.pipeline.cli.tree import show
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.lineage import Lineage, read
from firstlight.pipeline.tracking.location import named
from tests.support.mlflow_runs import STORE, Past, chain


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Past, dict[str, str]]:
    return chain(tmp_path_factory.mktemp("past"))


@pytest.fixture
def runs(made: tuple[Past, dict[str, str]]) -> dict[str, str]:
    return made[1]


@pytest.fixture
def lineage(made: tuple[Past, dict[str, str]]) -> Lineage:
    return read(named([f"storage={made[0].storage}"]))[0]


def text(shown: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_what_hangs_together(lineage: Lineage, runs: dict[str, str]) -> None:
    first = lineage.runs[runs["first"]]
    assert [run.name for run in lineage.stages(first)] == [
        "prepare",
        "pretrain seed 0",
        "evaluate seed 0",
        "pretrain seed 1",
        "evaluate seed 1",
    ]
    pretrained = lineage.runs[runs["pretrain0"]]
    assert [run.id for run in lineage.consumers(pretrained)] == [runs["evaluate0"], runs["other"]]
    assert lineage.source(lineage.runs[runs["other"]]) == pretrained
    assert [version.reference for version in lineage.models(pretrained)] == ["models:/digits-nat@current"]
    assert lineage.reference(lineage.runs[runs["pretrain1"]]) == f"runs:/{runs['pretrain1'][:8]}/encoder"
    assert {run.store for run in lineage.runs.values()} == {STORE}
    assert [run.name for run in lineage.tops()] == ["second", "first"]


def test_stages_that_an_earlier_run_has_made_belong_to_a_recipe_too(tmp_path: Path) -> None:
    past, runs = chain(tmp_path)
    past.tracking.log_stage(runs["second"], "pretrain", [runs["pretrain0"]])
    found, _ = read(named([f"storage={tmp_path}"]))
    assert [run.name for run in found.stages(found.runs[runs["second"]])] == [
        "prepare",
        "pretrain seed 0",
        "evaluate seed 0",
    ]


@pytest.mark.parametrize("word", ["id", "begun", "models:/digits-nat@current", "models:/digits-nat/1", "reference"])
def test_a_run_is_found_by(lineage: Lineage, runs: dict[str, str], word: str) -> None:
    run_id = runs["pretrain0"]
    words = {"id": run_id, "begun": run_id[:10], "reference": f"runs:/{run_id[:8]}/encoder"}
    assert lineage.find(words.get(word, word)).id == run_id
    assert lineage.find("second").id == runs["second"]


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
        lineage.find(word)


def test_nothing_was_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking.uri: 'sqlite:.* is not there: nothing was run in storage "):
        read(named([f"storage={tmp_path}"]))
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_an_experiment_that_is_not_there(made: tuple[Past, dict[str, str]]) -> None:
    with pytest.raises(UserError, match=r"^tracking.experiment: 'other' is not in sqlite"):
        read(named([f"storage={made[0].storage}", "tracking.experiment=other"]))


def test_the_table_of_runs(lineage: Lineage) -> None:
    shown = text(table(lineage, list(lines(lineage)), 120))
    assert "evaluate, 2 seeds" in shown
    assert "kNN 95.5 ± 0.7 % (random 90.0)" in shown
    assert "models:/digits-nat@current" in shown
    assert "train 1,438, test 359, 2 quarantined" in shown
    assert shown.index(" second ") < shown.index(" first ")
    narrow = text(table(lineage, list(lines(lineage)), 80), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "models:/digits-nat@current" in narrow


def test_the_lines_of_runs(lineage: Lineage, runs: dict[str, str]) -> None:
    head, *rows = [line.split("\t") for line in plain(lineage, list(lines(lineage, "fir"))).splitlines()]
    assert head == ["kind", "name", "id", "state", "start", "seconds", "numbers", "reference"]
    assert len(rows) == 6
    assert {row[2] for row in rows} == {
        runs[name] for name in ("first", "prepare", "pretrain0", "pretrain1", "evaluate0", "evaluate1")
    }
    by_id = {row[2]: row for row in rows}
    assert by_id[runs["pretrain1"]][7] == f"runs:/{runs['pretrain1']}/encoder"
    assert by_id[runs["evaluate1"]][6] == "kNN 96.0 % (random 90.0)"


def test_a_limit_says_what_it_leaves_out(lineage: Lineage) -> None:
    shown = list(lines(lineage, limit=1))
    assert [line.name for line in shown if line.depth == 0 and line.runs] == ["second"]
    assert shown[-1].more == "and 1 earlier: --limit 2"


def test_a_search_and_its_trials(tmp_path: Path) -> None:
    past = Past(tmp_path)
    search = past.recipe("temperature", kind="search")
    trial = past.recipe("trial-0", search, kind="trial")
    made_by = past.pretrain("trial-0", trial)
    past.evaluate("trial-0", trial, f"runs:/{made_by}/encoder")
    found, client = read(named([f"storage={tmp_path}"]))
    assert [(line.depth, line.name, line.numbers) for line in lines(found)] == [
        (0, "temperature (search)", ""),
        (1, "trial-0", "loss 0.750, held-out kNN 90.0 %; kNN 95.0 % (random 90.0)"),
    ]
    assert "kNN 95.0 % (random 90.0)" in text(show(found, found.find("temperature"), time.time()))
    assert promote(found, client, found.runs[trial], "best", "chosen") == "models:/best@chosen"
    assert read(named([f"storage={tmp_path}"]))[0].find("models:/best@chosen").id == made_by


def test_the_tree_of_a_recipe_goes_from_the_data_to_what_others_made_of_it(lineage: Lineage) -> None:
    shown = text(show(lineage, lineage.find("first"), time.time())).splitlines()
    names = [line.strip("│├└─ ").split("  ")[0] for line in shown[2:]]
    assert names == [
        "digits-abc",
        f"sha256 {STORE[:12]}",
        "pretrain seed 0",
        "models:/digits-nat/1",
        "evaluate seed 0",
        "evaluate seed 0",
        "pretrain seed 1",
        "evaluate seed 1",
    ]
    assert "in second" in shown[7]
    assert "1,438" in shown[2]


def test_one_stage_is_shown_with_what_it_consumed(lineage: Lineage, runs: dict[str, str]) -> None:
    shown = text(show(lineage, lineage.runs[runs["other"]], time.time()))
    assert "pretrain seed 0" in shown
    assert "pretrain seed 1" not in shown
    assert f"encoder models:/digits-nat/1, made by pretrain seed 0 ({runs['pretrain0'][:8]})" in shown
    assert f"sha256 {STORE}" in shown
    below = text(show(lineage, lineage.runs[runs["prepare"]], time.time()))
    assert below.count("evaluate seed 0") == 2
    assert "images digits" in below


def test_a_killed_run_is_not_called_running(tmp_path: Path) -> None:
    past = Past(tmp_path)
    recipe = past.recipe("killed")
    past.client.update_run(recipe, status="RUNNING")
    found, _ = read(named([f"storage={tmp_path}"]))
    assert state(found, found.runs[recipe]) == "running"
    (tmp_path / "killed" / ".lock").write_text("4711")
    assert state(found, found.runs[recipe]) == "stopped"


def test_promoting(tmp_path: Path) -> None:
    past, runs = chain(tmp_path)
    found, client = read(named([f"storage={tmp_path}"]))
    for _ in range(2):
        assert promote(found, client, found.runs[runs["pretrain1"]], "best", "current") == "models:/best@current"
    assert [v.version for v in client.search_model_versions("name='best'")] == [1], "twice is once"
    assert past.tracking.source_run(past.tracking.pin("models:/best@current", "x")) == runs["pretrain1"]
    for run, name, message in (
        ("evaluate0", "best", "makes no encoder"),
        ("second", "best", "has several pretrainings or none"),
        ("pretrain1", "a/b", "--name: 'a/b' is not valid"),
    ):
        with pytest.raises(UserError, match=message):
            promote(found, client, found.runs[runs[run]], name, "current")


def test_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named([]).uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"name": "x", "storage": "there", "tracking": {"uri": "http://host:5000"}, "stages": {}})
    )
    assert named([str(recipe)]) == named(["storage=there", "tracking.uri=http://host:5000"])
    assert named([str(recipe), "storage=here"]).storage == tmp_path / "here"
    for word in (["storag=x"], ["storage=3"], ["a.yaml", "b.yaml"]):
        with pytest.raises(UserError):
            named(word)
