"""A search in the terminal: the live table, the lines without a terminal, and the table at the end."""

import io

from rich.console import Console

from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.progress import TrialTable, pareto_front, rank_trials, shorten_keys, summarise_search
from tests.support.searches import LR, PERIOD, done_trial, make_search, make_trials


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_short_keys_are_distinct() -> None:
    assert shorten_keys([LR, PERIOD]) == {LR: "lr", PERIOD: "permutation_period"}
    two = ["stages.a.optimizer.lr", "stages.b.optimizer.lr"]
    assert shorten_keys(two) == {two[0]: "a.optimizer.lr", two[1]: "b.optimizer.lr"}


def test_best_trial_is_first() -> None:
    search = make_search(objectives=[{"measure": "pretrain.loss", "mode": "min"}])
    trials = [
        done_trial(0, {LR: 0.1, PERIOD: 1}, 0.5),
        Trial(1, {}, state="failed"),
        done_trial(2, {LR: 0.1, PERIOD: 1}, 0.3),
        Trial(3, {}, state="stopped"),
    ]
    assert [trial.number for trial in rank_trials(trials, search.objectives[0])] == [2, 0, 3, 1]


def test_pareto_front_has_no_dominated_trial() -> None:
    search = make_search(objectives=[{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}])
    scores = [(0.9, 0.5), (0.8, 0.2), (0.7, 0.4), (0.9, 0.6)]
    trials = [done_trial(k, {LR: 0.1, PERIOD: 1}, *pair) for k, pair in enumerate(scores)]
    assert [trial.number for trial in pareto_front(search, trials)] == [0, 1]


def test_summary_has_all_trials_and_the_best() -> None:
    search = make_search()
    trials = make_trials(search, 8, seeds=2)
    console = Console(file=io.StringIO(), width=140)
    best = max((t for t in trials if t.state == "done"), key=lambda t: t.means[0])
    console.print(summarise_search(search, trials, best, "models:/digits@best"))
    output = "\n".join(lines(console))
    assert "small-search: 8 trials, on held-out images, best first" in output
    assert f"best: trial {best.name}: {LR}=" in output
    assert "models:/digits@best" in output
    assert "behind others at 1 epochs: watch_knn 0.5" in output
    assert "±" in output


def test_lines_without_a_terminal() -> None:
    search, console = make_search(), Console(file=io.StringIO(), width=200)
    table, trial = TrialTable(console, search), Trial(0, {LR: 0.25, PERIOD: 2})
    with table:
        table.print_start(4, 2)
        table.add_trial(trial)
        # An earlier command reached 0.1.
        table.update_progress(trial, {"progress": 0.1, "stage": "pretrain"})
        table.last_printed, table.started = table.last_printed - 60.0, table.started - 50.0
        table.update_progress(trial, {"progress": 0.6, "stage": "pretrain"})
        trial.state, trial.scores, trial.seconds = "done", [[0.875]], 12.0
        table.print_end(trial)
    output = lines(console)
    assert output[0] == "small-search 4 trials, 2 at a time"
    assert output[1] == "small-search: 1 running of 4, about 5 min 40 s left", (
        "half a trial took 50 s, and 3.4 trials are left"
    )
    assert output[2] == "trial 000 done after 12 s: evaluate.knn 0.875  (lr 0.25, permutation_period 2)"


def test_live_table_fits_the_terminal_and_has_all_running_trials() -> None:
    search = make_search(trials=40)
    console = Console(file=io.StringIO(), width=120, height=20, force_terminal=True)
    table = TrialTable(console, search)
    for trial in [*make_trials(search, 30), Trial(30, {LR: 0.25, PERIOD: 2})]:
        table.add_trial(trial)
    running = table.trials[30]
    table.update_progress(running, {"progress": 0.1, "stage": "pretrain", "so_far": "loss 0.5"})
    console.print(table)
    output = lines(console)
    assert len(output) < 20
    assert any("030" in line and "loss 0.5" in line for line in output), "running trials are always visible"


def test_failed_trial_is_printed_in_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    table = TrialTable(console, make_search())
    table.print_end(Trial(1, {LR: 0.25, PERIOD: 2}, state="failed", reason="the loss of step 3 is not finite"))
    assert "trial 001 failed after 0 s: the loss of step 3 is not finite" in "\n".join(lines(console))
