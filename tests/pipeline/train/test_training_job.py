"""Batches of a training, as a learner gets them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.learner import Batch, Learner
from tests.support import recipes


class RecordingLearner(Learner):
    """Records the batches that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[Batch] = []
        self.steps: list[int] = []

    def begin_step(self, step: int) -> None:
        self.steps.append(step)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.weight.expand(len(batch.ids)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        self.seen.append(batch)
        return {"loss": outputs[0].mean()}


@pytest.mark.parametrize(("labelled", "per_class", "visible"), [(0, None, 0), (8, 2, 8), (32, 5, 32)])
def test_learner_gets_only_labels_of_the_labelled_subset(
    tmp_path: Path, digits: Store, labelled: int, per_class: int | None, visible: int
) -> None:
    changes = {"stages__pretrain__labelled_per_batch": labelled, "stages__pretrain__labels_per_class": per_class}
    context = StageContext.create(recipes.recipe(tmp_path, **changes), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "f", tmp_path / "job"))
    learner = RecordingLearner()
    fit(job, learner)
    few = set(context.splits.labelled_subset(stage, 0).tolist()) if labelled else set()
    assert len(learner.seen) == job.plan.steps * stage.epochs
    for batch in learner.seen:
        assert int((batch.labels >= 0).sum()) == visible
        assert torch.equal(torch.from_numpy(job.plan.ids)[batch.rows], batch.ids)
        for image_id, label in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            assert label == (context.splits.labels[image_id] if image_id in few else -1)


def test_learner_gets_views_of_their_own_sizes_in_order(tmp_path: Path, digits: Store) -> None:
    views = [{"count": 2}, {"size": 5, "augment": [{"op": "random_crop"}]}, {"augment": [{"op": "center_crop"}]}]
    context = StageContext.create(recipes.recipe(tmp_path, stages__pretrain__views=views), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "f", tmp_path / "job"))
    learner = RecordingLearner()
    fit(job, learner)
    plain = context.build_loader([context.recipe.dataset.eval_augment], 0)
    for batch in learner.seen:
        assert [tuple(view.shape[1:]) for view in batch.views] == [(3, 8, 8), (3, 8, 8), (3, 5, 5), (3, 8, 8)]
        whole = to_batch(plain.load_once(batch.ids.numpy()), torch.device("cpu"))
        assert torch.equal(batch.views[3], whole.views[0])
    assert learner.steps == list(range(job.total_steps))
