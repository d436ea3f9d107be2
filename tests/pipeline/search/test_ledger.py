"""The ledger: what is written is what is read, a trial that ended unseen is taken over, and what is no ledger is named."""

import json
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.search.ledger import LEDGER, OUTCOME, Ledger, Trial
from tests.support.searches import LR, PERIOD, many, parsed


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "store")
    ledger.trials = [*many(parsed(), 8), Trial(8, {LR: 0.1, PERIOD: 1})]
    ledger.references = {"finetune": "models:/x/3"}
    ledger.save()
    again = Ledger(tmp_path, "store")
    assert again.trials == ledger.trials
    assert again.references == ledger.references
    assert [trial.number for trial in again.of_state("running")] == [8]
    assert again.trials[0].means == [pytest.approx(trial) for trial in ledger.trials[0].scores[0]]


def test_a_trial_that_ended_unseen_is_taken_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "store")
    trial = Trial(3, {LR: 0.1, PERIOD: 1})
    assert not ledger.absorb(trial)
    ledger.place(trial).mkdir(parents=True)
    outcome = {
        "state": "done",
        "scores": [[0.5]],
        "encoder": "run",
        "reason": "",
        "seen": [[1.0, 0.25]],
        "seconds": 3.0,
        "ended": 10.0,
    }
    (ledger.place(trial) / OUTCOME).write_text(json.dumps(outcome))
    assert ledger.absorb(trial)
    assert (trial.state, trial.means, trial.encoder, trial.ended) == ("done", [0.5], "run", 10.0)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"trials": []}', '{"store": "store", "references": {}, "trials": [{"seen": [], "nonsense": 1}]}'],
)
def test_what_is_no_ledger_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text)
    with pytest.raises(UserError, match=r"ledger\.json: is not a ledger of a search"):
        Ledger(tmp_path, "store")


def test_other_images_are_refused(tmp_path: Path) -> None:
    Ledger(tmp_path, "store").save()
    with pytest.raises(UserError, match=r"dataset: is not of the images that this search began with .* another name="):
        Ledger(tmp_path, "other")
