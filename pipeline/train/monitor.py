"""What a pretraining tells of its features on the way: kNN accuracy on held-out images, signals that need no label, a warning when they collapse.

Nothing of it reaches the training: every step draws its random numbers anew from (seed, step), networks are in evaluation mode, no gradient is
made, and images are decoded in this process, beside the stream and not through it. Labels, where there are any, are those of held-out images and
of the bank of training images, withheld ones included: they decide what is logged and nothing else. The test split is never looked at.
"""

import time

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.schema import Augment
from firstlight.pipeline.config.stages import FeatureMonitorOptions as WatchSection
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.stream import EvalOrder, LoadingOptions, stream_batches
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.metrics import append
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.collective import broadcast_buffers, broadcast_object, rank, world_size
from firstlight.tasks.downstream.knn import weighted_knn
from firstlight.tasks.feature_metrics import alignment, compute_feature_metrics, describe_collapse
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from firstlight.tasks.pretrain.method import Method


class Watch:
    """Looks at a method every `stages.<pretrain>.watch.every` epochs, and at the end."""

    def __init__(self, worker: StageContext, stage: TrainingOptions, watch: WatchSection, job: TrainingJob, method: Method) -> None:
        self.worker, self.stage, self.watch, self.job, self.method = worker, stage, watch, job, method
        self.told = False
        splits = worker.splits
        labelled = splits.train[splits.labels[splits.train] >= 0]
        self.held_out, self.bank = self._drawn(splits.val), self._drawn(labelled)
        self.augment = worker.list_view_augments(stage)

    def due(self, step: int) -> bool:
        """Whether to look after `step` steps."""
        ended, steps = self.watch.every, self.job.plan.steps
        return ended > 0 and (step % (ended * steps) == 0 or step == self.job.total_steps)

    @torch.no_grad()
    def look(self) -> tuple[dict[str, float], float]:
        """The numbers of now, by name, and the seconds that they took; a note where features have collapsed. Collective."""
        started = time.monotonic()
        broadcast_buffers(
            self.method
        )  # running statistics of rank 0, which the next step, or the end, would share all the same
        self.method.eval()
        plain = self.worker.recipe.dataset.eval_augment
        held_out, *pair = self._features(self.held_out, [plain, *self.augment * 2])
        bank = self._features(self.bank, [plain])[0] if len(self.bank) >= world_size() else held_out[:0]
        self.method.train()
        found = broadcast_object(self._numbers(held_out, bank, pair) if rank() == 0 else None)
        return {f"watch_{name}": value for name, value in found.items()}, time.monotonic() - started

    def _drawn(self, ids: np.ndarray) -> np.ndarray:
        """The same images at every look, in every continuation."""
        rng = np.random.default_rng((self.job.seed, 0x3A7C))
        return np.sort(rng.choice(ids, min(self.watch.images, len(ids)), replace=False))

    def _features(self, ids: np.ndarray, views: list[Augment]) -> list[Tensor]:
        """(n, d) of each view of `ids`, on every worker."""
        head = self.method.exported_networks()["head"] if self.watch.features == "head" else None
        features = FeatureExtractor(self.method.encoder, head, (-1,), "avg")  # type: ignore[arg-type]
        size = max(self.stage.batch_size // world_size(), 64)
        options = LoadingOptions(False, self.worker.options.prefetch, 1, self.worker.options.task_cpus)
        parts = []
        for arrays in stream_batches(
            self.worker.build_loader(views, self.job.seed), EvalOrder(ids, size, rank(), world_size()), size, options
        ):
            batch = to_batch(arrays, self.job.device)
            parts.append([features(view)[0] for view in batch.views])
        return [gather_rows(view, len(ids)) for view in zip(*parts, strict=True)]

    def _numbers(self, held_out: Tensor, bank: Tensor, pair: list[Tensor]) -> dict[str, float]:
        found = compute_feature_metrics(held_out)
        if not found:
            append(self.job.folder, {"note": "features of held-out images are not finite numbers"})
            return found
        why = describe_collapse(found, held_out.shape[1])
        if why and not self.told:
            append(
                self.job.folder,
                {"note": f"features have collapsed: {why}; what they are of can hardly be told apart any more"},
            )
            self.told = True
        labels = self.worker.splits.labels
        known = torch.from_numpy(np.flatnonzero(labels[self.held_out] >= 0)).to(held_out.device)
        if len(known) and len(bank):
            of_bank, own = (torch.from_numpy(labels[ids]).to(held_out.device) for ids in (self.bank, self.held_out))
            predicted = weighted_knn(held_out[known], bank, of_bank, self.watch.knn_k, self.watch.knn_temperature)
            found["knn"] = float((predicted == own[known]).double().mean())
        return {**found, "alignment": alignment(pair[0], pair[1])}
