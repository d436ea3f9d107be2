"""The listing of runs: its lines, its table and its tab-separated form."""

from pathlib import Path

from firstlight.pipeline.cli.history import (
    MAX_TRIALS_LISTED,
    elapsed_seconds,
    group_by_stage,
    run_lines,
    run_state,
    runs_table,
    runs_tsv,
)
from firstlight.pipeline.tracking.lineage import Lineage, read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support.mlflow_runs import Past
from tests.support.rendering import render_text


def test_table_lists_newest_recipe_first_with_scores_and_references(lineage: Lineage) -> None:
    text = render_text(runs_table(lineage, list(run_lines(lineage)), 120))
    assert "evaluate, 2 seeds" in text
    assert "kNN 95.5 ± 0.7 % (random 90.0)" in text
    assert "models:/digits-nat@current" in text
    assert "train 1,438, test 359, 2 quarantined" in text
    assert text.index(" second ") < text.index(" first ")


def test_narrow_table_fits_80_characters_and_keeps_references(lineage: Lineage) -> None:
    text = render_text(runs_table(lineage, list(run_lines(lineage)), 80), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "models:/digits-nat@current" in text
    assert " ago, took " in text
    assert "duration" not in text


def test_tsv_has_a_line_for_each_run_with_full_ids(lineage: Lineage, run_ids: dict[str, str]) -> None:
    head, *rows = [line.split("\t") for line in runs_tsv(lineage, list(run_lines(lineage, "fir"))).splitlines()]
    assert head == ["kind", "name", "id", "state", "start", "seconds", "numbers", "reference"]
    assert len(rows) == 6
    assert {row[2] for row in rows} == {
        run_ids[name] for name in ("first", "prepare", "pretrain0", "pretrain1", "evaluate0", "evaluate1")
    }
    by_id = {row[2]: row for row in rows}
    assert by_id[run_ids["pretrain1"]][7] == f"runs:/{run_ids['pretrain1']}/encoder"
    assert by_id[run_ids["evaluate1"]][6] == "kNN 96.0 % (random 90.0)"


def test_limit_names_the_number_of_earlier_recipes(lineage: Lineage) -> None:
    lines = list(run_lines(lineage, limit=1))
    assert [line.name for line in lines if line.depth == 0 and line.runs] == ["second"]
    assert lines[-1].remark == "and 1 earlier: --limit 2"
    assert "and 1 earlier: --limit 2" in render_text(runs_table(lineage, lines, 120))


def test_search_lists_its_newest_trials_with_scores(tmp_path: Path) -> None:
    past = Past(tmp_path)
    search = past.recipe("temperature", kind="search")
    trial = past.recipe("trial-0", search, kind="trial")
    pretrained = past.pretrain("trial-0", trial)
    past.evaluate("trial-0", trial, f"runs:/{pretrained}/encoder")
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert [(line.depth, line.name, line.numbers) for line in run_lines(lineage)] == [
        (0, "temperature (search)", ""),
        (1, "trial-0", "loss 0.750, held-out kNN 90.0 %; kNN 95.0 % (random 90.0)"),
    ]
    for number in range(1, MAX_TRIALS_LISTED + 2):
        past.recipe(f"trial-{number}", search, kind="trial")
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    _, *trials, last = run_lines(lineage)
    assert [line.name for line in trials] == [f"trial-{number}" for number in range(2, MAX_TRIALS_LISTED + 2)]
    assert last.remark == f"and 2 earlier trials: firstlight show {search[:8]}"


def test_running_run_is_stopped_if_no_process_holds_its_lock(tmp_path: Path) -> None:
    past = Past(tmp_path)
    recipe = past.recipe("killed")
    past.client.update_run(recipe, status="RUNNING")
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert run_state(lineage, lineage.runs[recipe]) == "running"
    (tmp_path / "killed" / ".lock").write_text("4711")
    assert run_state(lineage, lineage.runs[recipe]) == "stopped"


def test_runs_of_a_stage_are_ordered_by_seed(lineage: Lineage, run_ids: dict[str, str]) -> None:
    names = ("pretrain1", "evaluate1", "pretrain0", "evaluate0")
    groups = group_by_stage([lineage.runs[run_ids[name]] for name in names])
    assert [[run.name for run in group] for group in groups] == [
        ["pretrain seed 0", "pretrain seed 1"],
        ["evaluate seed 0", "evaluate seed 1"],
    ]


def test_duration_of_seeds_that_ran_one_after_the_other_is_the_sum_of_their_work(tmp_path: Path) -> None:
    """MLflow's start and end of a run that was resumed also span the time between its attempts."""
    past = Past(tmp_path)
    parent = past.recipe("timed")
    for seed in (0, 1):
        past.evaluate("timed", parent, "runs:/abc/encoder", seed, seconds=60.0)
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    (line,) = (line for line in run_lines(lineage) if line.name == "evaluate, 2 seeds")
    assert [elapsed_seconds(run) for run in line.runs] == [60.0, 60.0]
    assert "2 min 00 s" in render_text(runs_table(lineage, [line], 120))
