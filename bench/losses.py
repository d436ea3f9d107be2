"""What the losses cost, as ratios of times of one thread in one run: `python -m bench.losses`.

Each line sets our form beside the naive one, or beside the matrix products that it cannot do without. CPU time, the best of a few repetitions.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from firstlight.tasks.corruption import patch_gaussian
from firstlight.tasks.counter_rng import keys
from firstlight.tasks.memory_bank import MemoryBank
from firstlight.tasks.pretrain.clustering_locality import locality
from firstlight.tasks.pretrain.nat import best_assignment
from firstlight.tasks.pretrain.spatial_contrasting import contrast_loss
from firstlight.tasks.pretrain.super_and import relation_cosines

Work = Callable[[], object]


def seconds(work: Work, repetitions: int = 3) -> float:
    """CPU seconds of the fastest of `repetitions`, after one that is not counted."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def unit(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1)


def assignment() -> list[tuple[str, Work, Work]]:
    """Noise As Targets, a batch of 512: features that are all alike, as at the start, against random ones; and scipy on the bare cost."""
    targets, spread = unit(512, 128), unit(512, 128)
    alike = F.normalize(unit(1, 128) + 0.05 * unit(512, 128), dim=1)
    bare = (-(alike.double() @ targets.double().T)).numpy()
    return [
        (
            "assignment, like features / random ones",
            lambda: best_assignment(alike, targets),
            lambda: best_assignment(spread, targets),
        ),
        (
            "assignment, like features / scipy alone",
            lambda: best_assignment(alike, targets),
            lambda: linear_sum_assignment(bare),
        ),
    ]


def memory_bank(n: int) -> list[tuple[str, Work, Work]]:
    """Super-AND, 256 queries of 128 dimensions against n rows: L_and and L_ue with their gradients."""
    bank = MemoryBank(n, 128, 0, 8192)
    bank.rows = F.normalize(bank.rows, dim=1)
    queries, own = unit(256, 128).requires_grad_(), torch.randperm(n)[:256]

    def ours() -> None:
        log_z, entropy = bank.others(queries, own, 0.1)
        (log_z.sum() + entropy.sum()).backward()

    def naive() -> None:
        logits = queries @ bank.rows.T / 0.1
        logits = logits.scatter(1, own[:, None], -1e4)
        (logits.logsumexp(1).sum() - (logits.softmax(1) * logits.log_softmax(1)).sum()).backward()

    def products() -> None:
        rows, q = bank.rows, queries.detach()
        for start in range(0, n, 8192):
            chunk = rows[start : start + 8192]
            weights = q @ chunk.T
            for _ in range(2):
                weights @ chunk

    pairs: list[tuple[str, Work, Work]] = [(f"bank of {n:,}: L_and and L_ue / three bare products", ours, products)]
    return [*pairs, (f"bank of {n:,}: L_and and L_ue / autograd", ours, naive)] if n <= 50_000 else pairs


def relations(n: int = 50_000) -> list[tuple[str, Work, Work]]:
    """Super-AND's augmentation loss: cosines of relations to n images, through the Gram matrix and as vectors of length n."""
    rows, views = unit(n, 128), unit(256, 128)
    gram = (rows.double().T @ rows.double()).float()

    def vectors() -> Tensor:
        relation = F.normalize(views @ rows.T, dim=1)
        return relation @ relation.T

    return [(f"relations to {n:,} images / as vectors", lambda: relation_cosines(views, views, gram), vectors)]


def penalties() -> list[tuple[str, Work, Work]]:
    """The locality penalty of 128 maps of 14 x 14, and loops over its half-spaces."""
    maps = torch.rand(128, 14, 14).requires_grad_()

    def loops() -> None:
        total = torch.zeros(())
        for k in range(1, 15):
            for part in (maps[:, :, :k], maps[:, :, -k:], maps[:, :k], maps[:, -k:]):
                total = total + part.flatten(1).norm(dim=1).sum()
        total.backward()

    return [("locality of 14 x 14 maps / loops", lambda: locality(maps).sum().backward(), loops)]


def contrasts() -> list[tuple[str, Work, Work]]:
    """Spatial contrasting, 256 images and 512 dimensions, and exact differences of all pairs."""
    a = torch.randn(256, 512).requires_grad_()
    b = (a.detach() + 0.1 * torch.randn(256, 512)).requires_grad_()

    def differences() -> None:
        apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        F.cross_entropy(-apart, torch.arange(256)).backward()

    return [("contrast loss of 256 / exact differences", lambda: contrast_loss(a, b, b)[0].backward(), differences)]


def corruptions() -> list[tuple[str, Work, Work]]:
    """Patch noise on 64 images of 89 pixels, and one image after the other."""
    images, levels, key = (
        torch.rand(64, 3, 89, 89),
        torch.full((64,), 0.1),
        keys(0, torch.zeros(64, dtype=torch.int64), torch.arange(64), 0),
    )

    def one_by_one() -> None:
        for k in range(64):
            patch_gaussian(images[k : k + 1], levels[k : k + 1], key[k : k + 1], 4)

    return [("patch noise on 64 images / one by one", lambda: patch_gaussian(images, levels, key, 4), one_by_one)]


def main() -> None:
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
        assignment(),
        memory_bank(50_000),
        memory_bank(400_000),
        relations(),
        penalties(),
        contrasts(),
        corruptions(),
    ):
        for name, ours, other in pairs:
            mine, theirs = seconds(ours), seconds(other)
            table.add_row(name, f"{1e3 * mine:.1f}", f"{1e3 * theirs:.1f}", f"{mine / theirs:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
