"""The exchange of targets in Noise As Targets, exact and approximate: `python -m bench.assignment`.

A network learns from 4,096 digits that are turned and shifted at random. Its features and the targets that the images
hold make the costs, before the training and after it. Times are CPU times of one thread, with the matrix product of the
costs, the best of three (of one for the largest batch).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.losses import measure_cpu_seconds
from firstlight.tasks.assignment import best_assignment, sparse_assignment
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain.method import TrainingInfo
from firstlight.tasks.pretrain.nat import NoiseAsTargets

ASSIGNED_IMAGES, ASSIGNMENT_BATCHES = 4096, (256, 1024, 4096)
# CIFAR-10's recipes, and ImageNet's
TARGET_DIMS = (128, 2048)
DIGIT_SIZE, DIGIT_BATCH, DIGIT_EPOCHS = 16, 256, 12


@dataclass(frozen=True)
class AssignmentComparison:
    """The two solvers on the costs of a batch.

    Attributes:
        exact_seconds: CPU time of the exact solver.
        sparse_seconds: CPU time of the approximation.
        best_cosine: mean cosine of the images and their targets at the optimum.
        held_cosine: that of the targets which the images held before.
        sparse_cosine: that of the approximation.
        deviation: standard deviation of the centred costs.
    """

    exact_seconds: float
    sparse_seconds: float
    best_cosine: float
    held_cosine: float
    sparse_cosine: float
    deviation: float

    @property
    def gap(self) -> float:
        """The mean cost above the optimum, in standard deviations: the unit of `SPARSE_TOLERANCE`."""
        return (self.best_cosine - self.sparse_cosine) / self.deviation

    @property
    def lost_share(self) -> float:
        """The share of what the best exchange gains that the approximation does not find."""
        return (self.best_cosine - self.sparse_cosine) / (self.best_cosine - self.held_cosine)


def compare_solvers(features: Tensor, targets: Tensor, repetitions: int) -> AssignmentComparison:
    """Solves and times an assignment of (n, d) features to the (n, d) targets that their images hold."""
    cosines = features.double() @ targets.double().T
    centred = cosines - cosines.mean(0) - cosines.mean(1, keepdim=True) + cosines.mean()

    def mean_cosine(order: Tensor) -> float:
        return float(cosines.gather(1, order[:, None]).mean())

    return AssignmentComparison(
        measure_cpu_seconds(lambda: best_assignment(features, targets), repetitions),
        measure_cpu_seconds(lambda: sparse_assignment(features, targets), repetitions),
        mean_cosine(best_assignment(features, targets)),
        float(cosines.diagonal().mean()),
        mean_cosine(sparse_assignment(features, targets)),
        float(centred.square().mean().sqrt()),
    )


def draw_digit_images(count: int, generator: torch.Generator) -> Tensor:
    """Returns (count, 3, DIGIT_SIZE, DIGIT_SIZE) images in 0..1: scikit-learn's digits, turned and shifted."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images).float() / 16
    chosen = digits[torch.randint(len(digits), (count,), generator=generator)][:, None]
    angles = (torch.rand(count, generator=generator) - 0.5) * math.pi / 2
    turns = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), 1).view(count, 2, 2) * 1.4
    shifts = (torch.rand(count, 2, 1, generator=generator) - 0.5) * 0.6
    grid = F.affine_grid(torch.cat((turns, shifts), 2), [count, 1, DIGIT_SIZE, DIGIT_SIZE], align_corners=False)
    return F.grid_sample(chosen, grid, align_corners=False).expand(-1, 3, -1, -1)


class DigitTraining:
    """Noise As Targets with `dim` dimensions on digits."""

    def __init__(self, images: Tensor, dim: int, epochs: int = DIGIT_EPOCHS) -> None:
        self.images, self.epochs = images, epochs
        spec = {"name": "convnet", "input": "sobel", "normalize": "image", "width": 16, "depth": 3}
        info = TrainingInfo(size=len(images), epochs=epochs, seed=0)
        torch.manual_seed(0)
        self.method = NoiseAsTargets(Encoder(spec, DIGIT_SIZE), info, dim=dim, hidden=(), dropout=0.0, pool="avg")

    def train(self) -> None:
        """Trains for all epochs, with an exact exchange of targets every three."""
        steps = self.epochs * (len(self.images) // DIGIT_BATCH)
        optimizer = torch.optim.SGD(self.method.parameters(), lr=1.0, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(self.epochs):
            self.method.begin_epoch(epoch)
            for rows in torch.randperm(len(self.images)).split(DIGIT_BATCH):
                optimizer.zero_grad()
                self.method(self._make_batch(rows))["loss"].backward()
                optimizer.step()
                schedule.step()
                self.method.end_step()

    @torch.no_grad()
    def read_pairs(self) -> tuple[Tensor, Tensor]:
        """Returns (n, dim) features of all images, as a step computes them, and the targets that the images hold."""
        rows = torch.arange(len(self.images))
        features = torch.cat([self.method.embed(self._make_batch(part))[0] for part in rows.split(DIGIT_BATCH)])
        assert self.method.noise is not None
        return features, self.method.noise.read(self.method.tables["assignment"].read(rows))

    def _make_batch(self, rows: Tensor) -> Batch:
        unknown = torch.full_like(rows, -1)
        return Batch(rows, rows, unknown, (self.images[rows],), torch.zeros_like(rows))


def list_comparisons(images: Tensor) -> Iterator[tuple[str, AssignmentComparison]]:
    """Yields the costs' name and the comparison of each dimension, state of the training and size of a batch."""
    for dim in TARGET_DIMS:
        training = DigitTraining(images, dim)
        for state in ("untrained", "trained"):
            features, targets = training.read_pairs()
            for size in ASSIGNMENT_BATCHES:
                name = f"{size:,} images, {dim:,} dimensions, {state}"
                yield name, compare_solvers(features[:size], targets[:size], 1 if size > 1024 else 3)
            if state == "untrained":
                training.train()


def main() -> None:
    """Measures all batches and prints a table."""
    torch.set_num_threads(1)
    table = Table(title="exchange of targets, one thread", title_justify="left")
    headings = ("exact ms", "sparse ms", "ratio", "gap / deviation of costs", "gain that is lost")
    table.add_column("batch")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, found in list_comparisons(draw_digit_images(ASSIGNED_IMAGES, torch.Generator().manual_seed(0))):
        exact, sparse = 1e3 * found.exact_seconds, 1e3 * found.sparse_seconds
        table.add_row(
            name,
            f"{exact:,.1f}",
            f"{sparse:,.1f}",
            f"{sparse / exact:.2f}",
            f"{found.gap:.1e}",
            f"{found.lost_share:.3%}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
