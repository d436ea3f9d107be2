"""The commands about recorded runs, from their arguments to what they print."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from firstlight.pipeline.cli.main import cli
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support.command_output import run_command
from tests.support.mlflow_runs import Past, chain


def test_runs_lists_the_named_recipes_up_to_the_limit(location: str) -> None:
    rows = [line.split("\t") for line in run_command("runs", location, "--limit", "1").splitlines()[1:]]
    assert {row[1] for row in rows} == {"second", "prepare", "evaluate seed 0"}
    assert "\tsecond\t" not in run_command("runs", location, "-n", "first")


def test_show_finds_a_run_by_the_first_characters_of_its_id(location: str, run_ids: dict[str, str]) -> None:
    assert run_command("show", run_ids["other"][:8], location).startswith(
        f"evaluate seed 0  evaluate {run_ids['other']}"
    )


def test_promote_names_the_pretraining(tmp_path: Path) -> None:
    _, run_ids = chain(tmp_path)
    output = run_command("promote", "first", f"storage={tmp_path}", "--name", "best", "--alias", "x")
    assert output == f"models:/best@x is now the encoder of pretrain seed 0 ({run_ids['pretrain0'][:8]})\n"


def test_delete_is_refused_if_other_runs_depend_on_the_run(location: str, run_ids: dict[str, str]) -> None:
    with pytest.raises(UserError) as error:
        run_command("delete", "first", location, "--yes")
    first, last = str(error.value).splitlines()
    assert first.startswith(f"run: evaluate seed 0 ({run_ids['other'][:8]}) of second started from the encoder")
    assert "--force" in last


def test_delete_needs_yes_without_a_terminal(location: str) -> None:
    with pytest.raises(UserError, match=r"^--yes: "):
        run_command("delete", "second", location)
    assert "second" in run_command("runs", location)


def test_forced_delete_lists_what_it_deletes(tmp_path: Path) -> None:
    _, run_ids = chain(tmp_path)
    output = run_command("delete", "first", f"storage={tmp_path}", "--yes", "--force").splitlines()
    assert output[0].startswith("6 runs: first (")
    assert output[-1] == "deleted"
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert lineage.runs.keys() == {run_ids["second"], run_ids["other"]}


def test_ui_names_the_address_of_a_server_and_starts_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from firstlight.pipeline.tracking import lineage

    found, client = read_lineage(parse_location([f"storage={Past(tmp_path).storage}"]))
    monkeypatch.setattr(lineage, "read_lineage", lambda records: (found, client))
    output = run_command("ui", "tracking.uri=http://mlflow:5000/")
    assert output == f"http://mlflow:5000/#/experiments/{found.experiment_id}/runs\n"


def test_repeat_refuses_an_override_that_decides_the_numbers(location: str) -> None:
    with pytest.raises(UserError, match=r"^stages\.pretrain\.epochs: cannot differ in a repetition"):
        run_command("repeat", "first", "stages.pretrain.epochs=3", "--from", location)


@pytest.mark.fault(55, "names in MLflow that a terminal would obey")
def test_names_of_mlflow_are_shown_with_escapes(tmp_path: Path) -> None:
    name = "evil\x1b[2J\u202egpj"
    past = Past(tmp_path)
    recipe = past.recipe("plain")
    stage = past.pretrain("plain", recipe, register_as="model")
    for run_id in (recipe, stage):
        past.client.update_run(run_id, name=name)
        past.client.set_tag(run_id, "firstlight.stage", name)
        past.client.set_tag(run_id, "firstlight.repeats", name)
    for arguments in (["runs"], ["show", recipe], ["show", stage], ["delete", stage, "--force"]):
        output = CliRunner().invoke(cli, [*arguments, f"storage={tmp_path}"]).output
        assert r"evil\x1b[2J\u202egpj" in output, arguments
        assert not set(output) & set("\x1b\u202e"), arguments
