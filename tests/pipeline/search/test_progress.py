"""A search in the terminal: the living table, the quiet lines, and the table at the end."""

import io

from rich.console import Console

from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.progress import View, closing, front, ranked, short
from tests.support.searches import LR, PERIOD, done, many, parsed


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_keys_are_as_short_as_tells_them_apart() -> None:
    assert short([LR, PERIOD]) == {LR: "lr", PERIOD: "permutation_period"}
    two = ["stages.a.optimizer.lr", "stages.b.optimizer.lr"]
    assert short(two) == {two[0]: "a.optimizer.lr", two[1]: "b.optimizer.lr"}


def test_the_best_is_first() -> None:
    search = parsed(objectives=[{"measure": "pretrain.loss", "mode": "min"}])
    trials = [
        done(0, {LR: 0.1, PERIOD: 1}, 0.5),
        Trial(1, {}, state="failed"),
        done(2, {LR: 0.1, PERIOD: 1}, 0.3),
        Trial(3, {}, state="stopped"),
    ]
    assert [trial.number for trial in ranked(trials, search.objectives[0])] == [2, 0, 3, 1]


def test_the_pareto_set() -> None:
    search = parsed(objectives=[{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}])
    scores = [(0.9, 0.5), (0.8, 0.2), (0.7, 0.4), (0.9, 0.6)]
    trials = [done(k, {LR: 0.1, PERIOD: 1}, *pair) for k, pair in enumerate(scores)]
    assert [trial.number for trial in front(search, trials)] == [0, 1]


def test_the_table_at_the_end() -> None:
    search = parsed()
    trials = many(search, 8, seeds=2)
    console = Console(file=io.StringIO(), width=140)
    best = max((t for t in trials if t.state == "done"), key=lambda t: t.means[0])
    console.print(closing(search, trials, best, "models:/digits@best"))
    told = "\n".join(lines(console))
    assert "small-search: 8 trials, on held-out images, best first" in told
    assert f"best: trial {best.name}: {LR}=" in told
    assert "models:/digits@best" in told
    assert "behind others at 1 epochs: watch_knn 0.5" in told
    assert "±" in told


def test_quiet_lines_where_there_is_no_terminal() -> None:
    search, console = parsed(), Console(file=io.StringIO(), width=200)
    view, trial = View(console, search), Trial(0, {LR: 0.25, PERIOD: 2})
    with view:
        view.start(4, 2)
        view.know(trial)
        view.report(trial, {"progress": 0.1, "stage": "pretrain"})  # as far as an earlier command has brought it
        view.told, view.started = view.told - 60.0, view.started - 50.0
        view.report(trial, {"progress": 0.6, "stage": "pretrain"})
        trial.state, trial.scores, trial.seconds = "done", [[0.875]], 12.0
        view.ended(trial)
    told = lines(console)
    assert told[0] == "small-search 4 trials, 2 at a time"
    assert told[1] == "small-search: 1 running of 4, about 5 min 40 s left", (
        "half a trial in 50 s, and three and 0.4 are to come"
    )
    assert told[2] == "trial 000 done after 12 s: evaluate.knn 0.875  (lr 0.25, permutation_period 2)"


def test_the_living_table_has_a_line_for_each_trial_that_the_terminal_has_room_for() -> None:
    search = parsed(trials=40)
    console = Console(file=io.StringIO(), width=120, height=20, force_terminal=True)
    view = View(console, search)
    for trial in [*many(search, 30), Trial(30, {LR: 0.25, PERIOD: 2})]:
        view.know(trial)
    running = view.trials[30]
    view.report(running, {"progress": 0.1, "stage": "pretrain", "so_far": "loss 0.5"})
    console.print(view)
    told = lines(console)
    assert len(told) < 20
    assert any("030" in line and "loss 0.5" in line for line in told), "those that run are always there"


def test_a_failed_trial_is_told_in_a_terminal_too() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    view = View(console, parsed())
    view.ended(Trial(1, {LR: 0.25, PERIOD: 2}, state="failed", reason="the loss of step 3 is not finite"))
    assert "trial 001 failed after 0 s: the loss of step 3 is not finite" in "\n".join(lines(console))
