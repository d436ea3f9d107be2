"""What a fine-tuning starts from: the arms, folded batch normalisations, rescaled layers; and its settings' errors."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import preflight
from firstlight.pipeline.stages import finetune
from firstlight.pipeline.stages.artifacts import save_encoder
from firstlight.pipeline.stages.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.state_hash import hash_state

HEAD = {"name": "classify", "hidden": [12, 10], "norm": "none", "dropout": 0.5, "dropout_layers": "all", "bias": 0.1}
RESCALED = {
    "encoder": {"name": "convnet", "input": "gray", "norm": "batch", "width": 4, "depth": 2},
    "stages__finetune__task": HEAD,
    "stages__finetune__batch_norm": "fold",
    "stages__finetune__rescale": "new_layers",
    "stages__finetune__learning_rates": [],
    "stages__finetune__epochs": 3,
    "stages__finetune__checkpoint_every": 1,
}


class Stopped(Exception):
    """The training reached the step that it was to stop at."""


def pretrained(folder: Path, spec: dict[str, Any]) -> tuple[Encoder, Path]:
    """An encoder whose batch normalisations have seen images, and its artifact."""
    torch.manual_seed(7)
    encoder = Encoder(spec, 8).train()
    encoder(torch.rand(64, 3, 8, 8) ** 2)
    save_encoder(encoder, folder / "encoder", {})
    return encoder, folder / "encoder"


def started(folder: Path, store: Store, arm: str, **changes: Any) -> tuple[StageContext, Finetune, StageInstance, Task]:
    """The task of an arm, before its first step."""
    recipe = recipes.recipe(folder, **changes)
    stage = recipe.stages["finetune"]
    assert isinstance(stage, Finetune)
    worker = StageContext.create(recipe, store, on_ray=False)
    encoder = folder / "encoder"
    if not encoder.exists():
        pretrained(folder, recipe.network_spec)
    start = {"given" if arm == "given" else "encoder": encoder}
    instance = StageInstance("finetune", 3, "f", folder / "job", **start)
    return worker, stage, instance, finetune._build_task(worker, stage, instance, arm)


def train(folder: str, store: str, stop: int | None, **changes: Any) -> tuple[str, dict[str, Tensor]]:
    """Trains or continues the arm `pretrained`, to its end or to step `stop`.

    Returns a hash of every bit of the end state, and the weights.
    """

    def stop_training(rank: int, step: int) -> None:
        if step == stop:
            raise Stopped

    failures.fault_hook = stop_training
    try:
        worker, stage, instance, task = started(Path(folder), Store.open(Path(store)), "pretrained", **changes)
        fit(finetune._build_job(worker, stage, instance, instance.folder, 0.1), task)
    finally:
        failures.fault_hook = None
    found, _ = Checkpoints(Path(folder) / "job" / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards]), task.state_dict()


@pytest.mark.parametrize("arm", ["gaussian", "he", "xavier"])
def test_arm_that_is_a_way_to_draw_weights_draws_those_of_the_task_too(tmp_path: Path, digits: Store, arm: Any) -> None:
    changes = {"stages__finetune__task": {**HEAD, "hidden": [300], "init": "gaussian", "bias": None}}
    head = started(tmp_path, digits, arm, **changes)[-1].head
    assert isinstance(head, nn.Sequential)
    first, last = [layer for layer in head if isinstance(layer, nn.Linear)]
    for layer in (first, last):
        fans = sum(layer.weight.shape)
        spread = {"gaussian": 0.01, "he": (2 / layer.weight.shape[1]) ** 0.5, "xavier": (2 / fans) ** 0.5}[arm]
        assert float(layer.weight.detach().std()) == pytest.approx(spread, rel=0.1)
        assert not layer.bias.any()


def test_other_arms_share_the_weights_of_the_head(tmp_path: Path, digits: Store) -> None:
    tasks = [started(tmp_path, digits, arm)[-1] for arm in ("pretrained", "given", "scratch", "lsuv")]
    heads = [{name: t for name, t in task.state_dict().items() if name.startswith("head")} for task in tasks]
    assert heads[0]
    assert all(torch.equal(heads[0][name], head[name]) for head in heads[1:] for name in heads[0])


def test_folded_encoder_gives_the_maps_of_the_pretrained_one(tmp_path: Path, digits: Store) -> None:
    encoder, _ = pretrained(tmp_path, {**RESCALED["encoder"], "normalize": "dataset"})  # type: ignore[dict-item]
    images = torch.rand(5, 3, 8, 8)
    expected = encoder.eval()(images)
    task = started(tmp_path, digits, "pretrained", **{**RESCALED, "stages__finetune__rescale": "none"})[-1]
    assert not any(isinstance(module, _BatchNorm) for module in task.modules())
    for found, map_ in zip(task.train().encoder(images), expected, strict=True):
        torch.testing.assert_close(found, map_, rtol=1e-5, atol=1e-5)
    kept = started(tmp_path, digits, "pretrained", **{**RESCALED, "stages__finetune__rescale": "none"}
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
    plain = started(tmp_path, digits, arm, **{**changes, "stages__finetune__rescale": "none"})[-1]
    before, after = (
        task.encoder(images)[-1].detach() for task in (plain, started(tmp_path, digits, arm, **changes)[-1])
    )
    shares = (after / before)[before > 1e-3]
    assert bool((shares - shares.mean()).abs().max() < 1e-3 * shares.mean()) == (rescale == "new_layers")
    fresh = {
        name: started(tmp_path, digits, "scratch", **{**changes, "stages__finetune__rescale": name})[-1].state_dict()
        for name in ("new_layers", "all_layers")
    }
    assert all(torch.equal(tensor, fresh["all_layers"][name]) for name, tensor in fresh["new_layers"].items())


@pytest.mark.parametrize("stop", [1, 2])
def test_training_of_a_rescaled_network_continues_with_the_same_bits(tmp_path: Path, digits: Store, stop: int) -> None:
    whole, _ = train(str(tmp_path / "whole"), str(digits.path), None, **RESCALED)
    with pytest.raises(Stopped):
        train(str(tmp_path / "parts"), str(digits.path), stop, **RESCALED)
    assert train(str(tmp_path / "parts"), str(digits.path), None, **RESCALED)[0] == whole


def test_two_workers_train_a_rescaled_network_as_one(tmp_path: Path, digits: Store, pool: Pool) -> None:
    """Without dropout, which draws numbers of its own on each worker."""
    changes = {**RESCALED, "stages__finetune__task": {**HEAD, "dropout": 0.0}}
    _, one = train(str(tmp_path / "one"), str(digits.path), None, **changes)
    pretrained(tmp_path / "two", recipes.recipe(tmp_path, **changes).network_spec)
    two = pool.run(partial(train, str(tmp_path / "two"), str(digits.path), None, **changes))
    for _, found in two:
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-5)


def test_rescaling_looks_at_the_first_training_images(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        finetune, "rescale_task", lambda task, batch, new_layers_only: seen.append((batch, new_layers_only))
    )
    worker, stage, instance, _ = started(tmp_path, digits, "pretrained", **RESCALED)
    started(tmp_path, digits, "scratch", **RESCALED)
    (batch, kept), (again, fresh) = seen
    ids = finetune.finetune_ids(worker, stage, instance)[:64]
    assert np.array_equal(batch.ids, ids)
    assert torch.equal(batch.views[0], again.views[0])
    assert (kept, fresh) == (True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"name": "convnet", "norm": "group", "width": 4, "depth": 2}},
            r"^stages\.finetune\.batch_norm: 'fold' is not valid: the network has no batch normalisation; valid: keep$",
        ),
        (
            {"stages__finetune__batch_norm": "keep"},
            r"^stages\.finetune\.rescale: 'new_layers' is not valid: 2 normalisations undo every scale; set "
            r"batch_norm: fold, and task\.norm: none if the head has hidden layers; valid: none$",
        ),
        (
            {"stages__finetune__task": {**HEAD, "norm": "batch"}},
            r"^stages\.finetune\.rescale: 'new_layers' is not valid: 2 normalisations undo every scale",
        ),
        (
            {"stages__finetune__batch_norm": "drop"},
            r"stages\.finetune\.batch_norm: .*keep.*fold",
        ),
    ],
)
def test_start_that_does_not_fit_the_network_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        preflight.check_recipe(recipes.recipe(tmp_path, **{**RESCALED, **changes}))
    assert "\n" not in str(told.value)


def test_all_arms_share_one_grid_of_learning_rates_by_default(tmp_path: Path) -> None:
    adam = {"name": "Adam", "lr": 0.001}
    grids = {
        rates: recipes.recipe(
            tmp_path, stages__finetune__optimizer=adam, stages__finetune__learning_rates=rates and list(rates)
        ).stages["finetune"]
        for rates in (None, (), (0.1, 0.2))
    }
    assert all(isinstance(stage, Finetune) for stage in grids.values())
    found = {rates: finetune.list_candidates(stage) for rates, stage in grids.items() if isinstance(stage, Finetune)}
    for arm in ("pretrained", "scratch"):
        rates_of = {rates: tuple(rate for its, rate in found[rates].values() if its == arm) for rates in found}
        assert rates_of == {None: (0.000333, 0.001, 0.003), (): (0.001,), (0.1, 0.2): (0.1, 0.2)}
