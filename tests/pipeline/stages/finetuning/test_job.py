"""The training of a fine-tuning continues with the same bits, and is the same on two workers."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning.job import build_finetune_job
from tests.support import recipes
from tests.support.finetunings import HEAD, RESCALED, save_seen_encoder, start_arm
from tests.support.gloo import Pool
from tests.support.local_training import Stopped, fit_until


def train(folder: str, store: str, stop: int | None, **changes: Any) -> tuple[str, dict[str, Tensor]]:
    """Trains or continues the arm `pretrained`, to its end or to step `stop`; returns what `fit_until` does."""
    worker, stage, instance, task = start_arm(Path(folder), Store.open(Path(store)), "pretrained", **changes)
    return fit_until(stop, build_finetune_job(worker, stage, instance, instance.folder, 0.1), task)


@pytest.mark.parametrize("stop", [1, 2])
def test_training_of_a_rescaled_network_continues_with_the_same_bits(tmp_path: Path, digits: Store, stop: int) -> None:
    whole, _ = train(str(tmp_path / "whole"), str(digits.path), None, **RESCALED)
    with pytest.raises(Stopped):
        train(str(tmp_path / "parts"), str(digits.path), stop, **RESCALED)
    assert train(str(tmp_path / "parts"), str(digits.path), None, **RESCALED)[0] == whole


def test_two_workers_train_a_rescaled_network_as_one(tmp_path: Path, digits: Store, pool: Pool) -> None:
    """The network has no dropout, which draws numbers of its own on each worker."""
    changes = {**RESCALED, "stages__finetune__task": {**HEAD, "dropout": 0.0}}
    _, one = train(str(tmp_path / "one"), str(digits.path), None, **changes)
    save_seen_encoder(tmp_path / "two", recipes.recipe(tmp_path, **changes).network_spec)
    two = pool.run(partial(train, str(tmp_path / "two"), str(digits.path), None, **changes))
    for _, found in two:
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-5)
