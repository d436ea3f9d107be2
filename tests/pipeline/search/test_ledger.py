"""The state of a search: it is read as it was written, outcomes of trials are loaded, other files are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.records import seal_record
from firstlight.pipeline.search.ledger import LEDGER_FILE, OUTCOME_FILE, SearchState, Trial
from tests.support.searches import LR, PERIOD, make_search, make_trials


def test_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    ledger = SearchState(tmp_path, "store")
    ledger.trials = [*make_trials(make_search(), 8), Trial(8, {LR: 0.1, PERIOD: 1})]
    ledger.references = {"finetune": "models:/x/3"}
    ledger.save()
    again = SearchState(tmp_path, "store")
    assert again.trials == ledger.trials
    assert again.references == ledger.references
    assert [trial.number for trial in again.trials_in("running")] == [8]
    assert again.trials[0].means == [pytest.approx(trial) for trial in ledger.trials[0].scores[0]]


def test_outcome_of_a_trial_is_loaded(tmp_path: Path) -> None:
    ledger = SearchState(tmp_path, "store")
    trial = Trial(3, {LR: 0.1, PERIOD: 1})
    assert not ledger.load_outcome(trial)
    ledger.trial_folder(trial).mkdir(parents=True)
    outcome = {
        "state": "done",
        "scores": [[0.5]],
        "encoder": "run",
        "reason": "",
        "seen": [[1.0, 0.25]],
        "seconds": 3.0,
        "ended": 10.0,
    }
    (ledger.trial_folder(trial) / OUTCOME_FILE).write_text(json.dumps(outcome))
    assert ledger.load_outcome(trial)
    assert (trial.state, trial.means, trial.encoder, trial.ended) == ("done", [0.5], "run", 10.0)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"trials": []}', '{"store": "store", "references": {}, "trials": [{"seen": [], "nonsense": 1}]}'],
)
def test_file_that_is_no_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER_FILE).write_text(text)
    with pytest.raises(UserError, match=r"ledger\.json: is damaged: .*; delete the folder to start the search"):
        SearchState(tmp_path, "store")


WRONG_TRIALS: list[tuple[dict[str, Any], str]] = [
    ({"scores": [[99]]}, "trial 0 has the score 99; valid: 0 to 1"),
    ({"scores": [[float("nan")]]}, "trials.0.scores.0.0 = nan: must be a finite number"),
    ({"scores": []}, "trial 0 has scores for 0 objectives"),
    ({"scores": [[]]}, "trials.0.scores.0 = []"),
    ({"scores": [[0.5], [0.5]]}, "trial 0 has scores for 2 objectives"),
    ({"scores": 3}, "trials.0.scores = 3: must be a valid list"),
    ({"state": "won"}, "trials.0.state = 'won'"),
    ({"seen": [[1.0]]}, "trials.0.seen.0 = [1.0]"),
    ({"number": -1}, "trials.0.number = -1"),
    ({"values": []}, "trials.0.values = []"),
    ({"training": "/etc"}, "trial 0 has its training in /etc, outside of"),
    ({"parts": [{"end": 3}]}, "trials.0.parts.0.values is missing"),
    ({"nonsense": 1}, "nonsense"),
]


@pytest.mark.parametrize(("wrong", "problem"), WRONG_TRIALS)
@pytest.mark.parametrize("sealed", [True, False])
def test_wrong_trial_is_named(tmp_path: Path, wrong: dict[str, Any], problem: str, sealed: bool) -> None:
    """With the right sum, and without one as earlier versions wrote it."""
    ledger = SearchState(tmp_path, "store")
    ledger.trials = [Trial(0, {LR: 0.1}, state="done", scores=[[0.5]])]
    ledger.save()
    raw = {key: value for key, value in json.loads((tmp_path / LEDGER_FILE).read_text()).items() if key != "sum"}
    assert SearchState(tmp_path, "store", [(0.0, 1.0)]).trials == ledger.trials
    raw["trials"][0] |= wrong
    (tmp_path / LEDGER_FILE).write_text(json.dumps(seal_record(raw) if sealed else raw))
    with pytest.raises(UserError, match=rf"^{tmp_path}/ledger\.json: is damaged: .*{re.escape(problem)}"):
        SearchState(tmp_path, "store", [(0.0, 1.0)])


@pytest.mark.fault(18, "a bit of a search's ledger")
def test_changed_score_is_detected(tmp_path: Path) -> None:
    ledger = SearchState(tmp_path, "store")
    ledger.trials = [Trial(0, {LR: 0.1}, state="done", scores=[[0.25]])]
    ledger.save()
    (tmp_path / LEDGER_FILE).write_text((tmp_path / LEDGER_FILE).read_text().replace("0.25", "0.75"))
    with pytest.raises(UserError, match=r"ledger\.json: is damaged: its content differs from its sum"):
        SearchState(tmp_path, "store")


@pytest.mark.parametrize("text", ["[]", "{", '{"state": "done"}', '{"state": "done", "scores": "x"}'])
def test_damaged_outcome_of_a_trial_is_named(tmp_path: Path, text: str) -> None:
    ledger = SearchState(tmp_path, "store")
    trial = Trial(0, {LR: 0.1})
    ledger.trial_folder(trial).mkdir(parents=True)
    (ledger.trial_folder(trial) / OUTCOME_FILE).write_text(text)
    with pytest.raises(UserError, match=r"000/outcome\.json: is damaged: .*the trial resumes from its checkpoints$"):
        ledger.load_outcome(trial)


def test_ledger_of_other_images_is_refused(tmp_path: Path) -> None:
    SearchState(tmp_path, "store").save()
    with pytest.raises(
        UserError, match=r"dataset: the images are not those that this search began with .* another name="
    ):
        SearchState(tmp_path, "other")
