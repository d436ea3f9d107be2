"""The starting weights of a fine-tuning: the arms, folded batch normalisations, rescaled layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning import arms
from firstlight.pipeline.stages.finetuning.job import finetune_ids
from tests.support.finetunings import HEAD, RESCALED, save_seen_encoder, start_arm


@pytest.mark.parametrize("arm", ["gaussian", "he", "xavier"])
def test_arm_that_is_a_way_to_draw_weights_draws_those_of_the_task_too(tmp_path: Path, digits: Store, arm: Any) -> None:
    changes = {"stages__finetune__task": {**HEAD, "hidden": [300], "init": "gaussian", "bias": None}}
    head = start_arm(tmp_path, digits, arm, **changes)[-1].head
    assert isinstance(head, nn.Sequential)
    first, last = [layer for layer in head if isinstance(layer, nn.Linear)]
    for layer in (first, last):
        fans = sum(layer.weight.shape)
        spread = {"gaussian": 0.01, "he": (2 / layer.weight.shape[1]) ** 0.5, "xavier": (2 / fans) ** 0.5}[arm]
        assert float(layer.weight.detach().std()) == pytest.approx(spread, rel=0.1)
        assert not layer.bias.any()


def test_other_arms_share_the_weights_of_the_head(tmp_path: Path, digits: Store) -> None:
    tasks = [start_arm(tmp_path, digits, arm)[-1] for arm in ("pretrained", "given", "scratch", "lsuv")]
    heads = [{name: t for name, t in task.state_dict().items() if name.startswith("head")} for task in tasks]
    assert heads[0]
    assert all(torch.equal(heads[0][name], head[name]) for head in heads[1:] for name in heads[0])


def test_folded_encoder_gives_the_maps_of_the_pretrained_one(tmp_path: Path, digits: Store) -> None:
    encoder, _ = save_seen_encoder(tmp_path, {**RESCALED["encoder"], "normalize": "dataset"})  # type: ignore[dict-item]
    images = torch.rand(5, 3, 8, 8)
    expected = encoder.eval()(images)
    task = start_arm(tmp_path, digits, "pretrained", **{**RESCALED, "stages__finetune__rescale": "none"})[-1]
    assert not any(isinstance(module, _BatchNorm) for module in task.modules())
    for found, map_ in zip(task.train().encoder(images), expected, strict=True):
        torch.testing.assert_close(found, map_, rtol=1e-5, atol=1e-5)
    kept = start_arm(tmp_path, digits, "pretrained", **{**RESCALED, "stages__finetune__rescale": "none"}
                   | {"stages__finetune__batch_norm": "keep"})[-1]  # fmt: skip
    assert any(isinstance(module, _BatchNorm) for module in kept.modules())


@pytest.mark.parametrize("arm", ["pretrained", "given"])
@pytest.mark.parametrize("rescale", ["new_layers", "all_layers"])
def test_only_rescaling_all_layers_changes_what_a_loaded_encoder_computes(
    tmp_path: Path, digits: Store, rescale: str, arm: str
) -> None:
    """Up to a factor. From scratch, all layers are new: both do the same."""
    changes = {**RESCALED, "stages__finetune__rescale": rescale}
    images = torch.rand(5, 3, 8, 8)
    plain = start_arm(tmp_path, digits, arm, **{**changes, "stages__finetune__rescale": "none"})[-1]
    before, after = (
        task.encoder(images)[-1].detach() for task in (plain, start_arm(tmp_path, digits, arm, **changes)[-1])
    )
    shares = (after / before)[before > 1e-3]
    assert bool((shares - shares.mean()).abs().max() < 1e-3 * shares.mean()) == (rescale == "new_layers")
    fresh = {
        name: start_arm(tmp_path, digits, "scratch", **{**changes, "stages__finetune__rescale": name})[-1].state_dict()
        for name in ("new_layers", "all_layers")
    }
    assert all(torch.equal(tensor, fresh["all_layers"][name]) for name, tensor in fresh["new_layers"].items())


def test_rescaling_looks_at_the_first_training_images(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        arms, "rescale_task", lambda task, batch, new_layers_only: seen.append((batch, new_layers_only))
    )
    worker, stage, instance, _ = start_arm(tmp_path, digits, "pretrained", **RESCALED)
    start_arm(tmp_path, digits, "scratch", **RESCALED)
    (batch, kept), (again, fresh) = seen
    ids = finetune_ids(worker, stage, instance)[:64]
    assert np.array_equal(batch.ids, ids)
    assert torch.equal(batch.views[0], again.views[0])
    assert (kept, fresh) == (True, False)
