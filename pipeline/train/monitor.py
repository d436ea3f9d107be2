"""Monitors the features of a pretraining: kNN accuracy on held-out images, metrics without labels, and collapse.

The monitor changes no bit of the training: every step seeds its random numbers from (seed, step), networks are in
evaluation mode, no gradient is computed, and images are decoded in this process and not through the stream. The encoder
computes in the training's precision, its head in single precision. Labels of held-out images and of a bank of training
images, withheld ones included, only decide what is logged. The test split is never used.
"""

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.schema import Augment
from firstlight.pipeline.config.stages import FeatureMonitorOptions, TrainingOptions
from firstlight.pipeline.data.stream import EvalOrder, LoadingOptions, stream_batches
from firstlight.pipeline.train.backward_pass import find_autocast
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.metrics import append_row
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.collective import broadcast_buffers, broadcast_object, rank, world_size
from firstlight.tasks.downstream.knn import weighted_knn
from firstlight.tasks.feature_metrics import alignment, compute_feature_metrics, describe_collapse
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from firstlight.tasks.pretrain.method import Method


class FeatureMonitor:
    """Evaluates the features of a method every `stages.<pretrain>.watch.every` epochs, and at the end."""

    def __init__(
        self,
        context: StageContext,
        stage: TrainingOptions,
        watch: FeatureMonitorOptions,
        job: TrainingJob,
        method: Method,
    ) -> None:
        self.context, self.stage, self.options, self.job, self.method = context, stage, watch, job, method
        self.warned = False
        splits = context.splits
        labelled = splits.train[splits.labels[splits.train] >= 0]
        self.held_out, self.bank = self._draw_ids(splits.val), self._draw_ids(labelled)
        self.augment = context.list_view_augments(stage)

    def is_due(self, step: int) -> bool:
        """Returns True if the features are evaluated after `step` steps."""
        ended, steps = self.options.every, self.job.plan.steps
        return ended > 0 and (step % (ended * steps) == 0 or step == self.job.total_steps)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Returns metrics by name. Writes a note on collapse. It is collective."""
        # Running statistics are those of rank 0: the next step, or the end, would share them as well.
        broadcast_buffers(self.method)
        self.method.eval()
        plain = self.context.recipe.dataset.eval_augment
        held_out, *pair = self._compute_features(self.held_out, [plain, *self.augment * 2])
        bank = self._compute_features(self.bank, [plain])[0] if len(self.bank) >= world_size() else held_out[:0]
        self.method.train()
        found = broadcast_object(self._compute_metrics(held_out, bank, pair) if rank() == 0 else None)
        return {f"watch_{name}": value for name, value in found.items()}

    def _draw_ids(self, ids: np.ndarray) -> np.ndarray:
        """Draws at most `options.images` of `ids`: the same ones for every evaluation, also after a resume."""
        rng = np.random.default_rng((self.job.seed, 0x3A7C))
        return np.sort(rng.choice(ids, min(self.options.images, len(ids)), replace=False))

    def _compute_features(self, ids: np.ndarray, views: list[Augment]) -> list[Tensor]:
        """Returns the (n, d) features of each view of `ids`, on every worker. It is collective."""
        head = self.method.exported_networks()["head"] if self.options.features == "head" else None
        autocast = find_autocast(self.stage.precision, self.job.device)
        encoder = self.method.exported_encoder()
        features = FeatureExtractor(encoder, head, (-1,), "avg", autocast)  # type: ignore[arg-type]
        size = max(self.stage.batch_size // world_size(), 64)
        # Tasks of Ray are processes; a worker of its on CPUs has no core for threads.
        on_cpus_of_ray = self.context.options.on_ray and self.job.device.type != "cuda"
        tasks = 1 if on_cpus_of_ray else self.context.options.tasks
        options = LoadingOptions(False, self.context.options.prefetch, tasks, self.context.options.task_cpus)
        parts = []
        for arrays in stream_batches(
            self.context.build_loader(views, self.job.seed), EvalOrder(ids, size, rank(), world_size()), size, options
        ):
            batch = to_batch(arrays, self.job.device)
            parts.append([features(view)[0] for view in batch.views])
        return [gather_rows(view, len(ids)) for view in zip(*parts, strict=True)]

    def _compute_metrics(self, held_out: Tensor, bank: Tensor, pair: list[Tensor]) -> dict[str, float]:
        found = compute_feature_metrics(held_out)
        if not found:
            append_row(self.job.folder, {"note": "features of held-out images are not finite numbers"})
            return found
        why = describe_collapse(found, held_out.shape[1])
        if why and not self.warned:
            append_row(
                self.job.folder,
                {"note": f"features have collapsed: {why}; different images have nearly the same features"},
            )
            self.warned = True
        labels = self.context.splits.labels
        known = torch.from_numpy(np.flatnonzero(labels[self.held_out] >= 0)).to(held_out.device)
        if len(known) and len(bank):
            of_bank, own = (torch.from_numpy(labels[ids]).to(held_out.device) for ids in (self.bank, self.held_out))
            predicted = weighted_knn(held_out[known], bank, of_bank, self.options.knn_k, self.options.knn_temperature)
            found["knn"] = float((predicted == own[known]).double().mean())
        return {**found, "alignment": alignment(pair[0], pair[1])}
