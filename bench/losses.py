"""The cost of the losses, as ratios of times of one thread in one run: `python -m bench.losses`.

Each line compares our form with the naive one, or with the matrix products that it needs at least. Times are CPU times,
the best of a few repetitions.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from firstlight.tasks.assignment import best_assignment
from firstlight.tasks.corruption import add_patch_noise
from firstlight.tasks.counter_rng import derive_keys
from firstlight.tasks.memory_bank import MemoryBank
from firstlight.tasks.pretrain.clustering_locality import locality_penalty
from firstlight.tasks.pretrain.spatial_contrasting import contrast_loss
from firstlight.tasks.relation_losses import relation_cosines

BenchCall = Callable[[], object]


def measure_cpu_seconds(work: BenchCall, repetitions: int = 3) -> float:
    """Returns the CPU seconds of the fastest of `repetitions` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def random_unit_rows(n: int, d: int) -> Tensor:
    """Returns (n, d) random unit vectors."""
    return F.normalize(torch.randn(n, d), dim=1)


def assignment_pairs() -> list[tuple[str, BenchCall, BenchCall]]:
    """Returns the pairs for Noise As Targets with a batch of 512.

    Features that are all alike, as at the start, are compared with random ones, and with scipy on the bare cost.
    """
    targets, random_features = random_unit_rows(512, 128), random_unit_rows(512, 128)
    alike = F.normalize(random_unit_rows(1, 128) + 0.05 * random_unit_rows(512, 128), dim=1)
    bare = (-(alike.double() @ targets.double().T)).numpy()
    return [
        (
            "assignment, like features / random ones",
            lambda: best_assignment(alike, targets),
            lambda: best_assignment(random_features, targets),
        ),
        (
            "assignment, like features / scipy alone",
            lambda: best_assignment(alike, targets),
            lambda: linear_sum_assignment(bare),
        ),
    ]


def memory_bank_pairs(n: int) -> list[tuple[str, BenchCall, BenchCall]]:
    """Returns the pair for Super-AND, 256 queries of 128 dimensions and n rows: L_and and L_ue with their gradients."""
    bank = MemoryBank(n, 128, 0, 8192)
    bank.values = F.normalize(bank.values, dim=1)
    queries, own = random_unit_rows(256, 128).requires_grad_(), torch.randperm(n)[:256]

    def ours() -> None:
        log_z, entropy = bank.contrast_others(queries, own, 0.1)
        (log_z.sum() + entropy.sum()).backward()

    def naive() -> None:
        logits = queries @ bank.values.T / 0.1
        logits = logits.scatter(1, own[:, None], -1e4)
        (logits.logsumexp(1).sum() - (logits.softmax(1) * logits.log_softmax(1)).sum()).backward()

    def products() -> None:
        rows, q = bank.values, queries.detach()
        for start in range(0, n, 8192):
            chunk = rows[start : start + 8192]
            weights = q @ chunk.T
            for _ in range(2):
                weights @ chunk

    pairs: list[tuple[str, BenchCall, BenchCall]] = [
        (f"bank of {n:,}: L_and and L_ue / three bare products", ours, products)
    ]
    return [*pairs, (f"bank of {n:,}: L_and and L_ue / autograd", ours, naive)] if n <= 50_000 else pairs


def relation_pairs(n: int = 50_000) -> list[tuple[str, BenchCall, BenchCall]]:
    """Returns the pair for the augmentation loss of Super-AND: cosines of relations to n images.

    Ours uses the Gram matrix, the other one uses vectors of length n.
    """
    rows, views = random_unit_rows(n, 128), random_unit_rows(256, 128)
    gram = (rows.double().T @ rows.double()).float()

    def vectors() -> Tensor:
        relation = F.normalize(views @ rows.T, dim=1)
        return relation @ relation.T

    return [(f"relations to {n:,} images / as vectors", lambda: relation_cosines(views, views, gram), vectors)]


def locality_pairs() -> list[tuple[str, BenchCall, BenchCall]]:
    """Returns the pair for the locality penalty of 128 maps of 14 x 14, and loops over its half-spaces."""
    maps = torch.rand(128, 14, 14).requires_grad_()

    def loops() -> None:
        total = torch.zeros(())
        for k in range(1, 15):
            for part in (maps[:, :, :k], maps[:, :, -k:], maps[:, :k], maps[:, -k:]):
                total = total + part.flatten(1).norm(dim=1).sum()
        total.backward()

    return [("locality of 14 x 14 maps / loops", lambda: locality_penalty(maps).sum().backward(), loops)]


def contrast_pairs() -> list[tuple[str, BenchCall, BenchCall]]:
    """Returns the pair for spatial contrasting of 256 images and 512 dimensions, and exact differences of all pairs."""
    a = torch.randn(256, 512).requires_grad_()
    b = (a.detach() + 0.1 * torch.randn(256, 512)).requires_grad_()

    def differences() -> None:
        apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        F.cross_entropy(-apart, torch.arange(256)).backward()

    return [("contrast loss of 256 / exact differences", lambda: contrast_loss(a, b, b)[0].backward(), differences)]


def corruption_pairs() -> list[tuple[str, BenchCall, BenchCall]]:
    """Returns the pair for patch noise on 64 images of 89 x 89 pixels at once, and on one image after the other."""
    images, levels = torch.rand(64, 3, 89, 89), torch.full((64,), 0.1)
    key = derive_keys(0, torch.zeros(64, dtype=torch.int64), torch.arange(64), 0)

    def one_by_one() -> None:
        for k in range(64):
            add_patch_noise(images[k : k + 1], levels[k : k + 1], key[k : k + 1], 4)

    return [("patch noise on 64 images / one by one", lambda: add_patch_noise(images, levels, key, 4), one_by_one)]


def main() -> None:
    """Measures all pairs and prints a table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(
        "ours / other",
        "ours ms",
        "other ms",
        "ratio",
        title="losses, forward and backward, one thread",
        title_justify="left",
    )
    for pairs in (
        assignment_pairs(),
        memory_bank_pairs(50_000),
        memory_bank_pairs(400_000),
        relation_pairs(),
        locality_pairs(),
        contrast_pairs(),
        corruption_pairs(),
    ):
        for name, ours, other in pairs:
            our_seconds, other_seconds = measure_cpu_seconds(ours), measure_cpu_seconds(other)
            ratio = our_seconds / other_seconds
            table.add_row(name, f"{1e3 * our_seconds:.1f}", f"{1e3 * other_seconds:.1f}", f"{ratio:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
