"""The state of a search: it is read as it was written, outcomes of trials are loaded, other files are refused."""

import json
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
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
    with pytest.raises(UserError, match=r"ledger\.json: is not a ledger of a search"):
        SearchState(tmp_path, "store")


def test_ledger_of_other_images_is_refused(tmp_path: Path) -> None:
    SearchState(tmp_path, "store").save()
    with pytest.raises(
        UserError, match=r"dataset: the images are not those that this search began with .* another name="
    ):
        SearchState(tmp_path, "other")
