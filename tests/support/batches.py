"""Batches of random images for tests of methods and tasks."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.learner import Batch

# (B,) values of the images of a batch, or a function of its rows.
RowValues = Tensor | Callable[[Tensor], Tensor]


def image_batch(
    rows: Tensor | int,
    *,
    size: int = 8,
    views: int = 1,
    dtype: torch.dtype = torch.float32,
    ids: RowValues | None = None,
    labels: RowValues | None = None,
    turn: int = 0,
) -> Batch:
    """A batch of (B,) rows in pass `turn`, or of the first so many. Each image is a function of its row: it is the same
    in every batch.

    `ids` default to the rows, and `labels` to -1 (unknown); both may be functions of the rows.
    """
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    ids, labels = (values(rows) if callable(values) else values for values in (ids, labels))
    images = [
        torch.stack([torch.rand(3, size, size, generator=_seeded(views * int(row) + view)) for row in rows]).to(dtype)
        for view in range(views)
    ]
    unknown = torch.full_like(rows, -1)
    return Batch(
        rows if ids is None else ids,
        rows,
        unknown if labels is None else labels,
        tuple(images),
        torch.full_like(rows, turn),
    )


def number_otherwise(rows: Tensor) -> Tensor:
    """Ids that differ from the rows: tables must be asked for rows."""
    return 1000 - rows


def unevenly_labelled(rows: Tensor) -> Tensor:
    """Labels 0..4 of a third of the rows 0..15 and 32..43, and -1 for all others.

    Two workers have 6 and 4 labelled ones of 64 images; three workers have 6, 0 and 4 of 48 images.
    """
    return torch.where((rows % 3 == 0) & (rows % 32 < 16) & (rows < 44), rows % 5, -1)


def batch_of_images(
    images: Tensor | tuple[Tensor, ...],
    targets: Mapping[str, Tensor] | None = None,
    *,
    ids: Tensor | None = None,
    turn: int = 0,
) -> Batch:
    """A batch of given images (B, 3, H, W), or of several views of them, with targets but without labels."""
    views = images if isinstance(images, tuple) else (images,)
    rows = torch.arange(len(views[0])) if ids is None else ids
    return Batch(rows, rows, torch.full_like(rows, -1), views, torch.full_like(rows, turn), dict(targets or {}))


def labelled_batch(count: int = 12, *, size: int = 8, views: int = 1, classes: int = 5) -> Batch:
    """A batch of random images with random labels, both drawn from one seed."""
    rng = _seeded(3)
    rows, labels = torch.arange(count), torch.randint(classes, (count,), generator=rng)
    images = tuple(torch.rand(count, 3, size, size, generator=rng) for _ in range(views))
    return Batch(rows, rows, labels, images, torch.zeros_like(rows))


def draw_two_batches(shape: tuple[int, ...] = (3, 3, 4, 4)) -> tuple[Tensor, Tensor]:
    """Two tensors of normal numbers in double precision, drawn from one seed."""
    rng = _seeded(0)
    return torch.randn(shape, generator=rng, dtype=torch.float64), torch.randn(
        shape, generator=rng, dtype=torch.float64
    )


def unit_rows(n: int, d: int, seed: int) -> Tensor:
    """(n, d) rows of norm 1 in double precision."""
    return F.normalize(torch.randn(n, d, generator=_seeded(seed), dtype=torch.float64), dim=1)


def mask_batch(count: int = 6, *, size: int = 13, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch of random images with masks of the classes 0..2 and of void pixels (255)."""
    rng = _seeded(3)
    mask = torch.randint(4, (count, size, size), generator=rng, dtype=torch.uint8)
    mask[mask == 3] = 255
    return batch_of_images(torch.rand(count, 3, size, size, generator=rng).to(dtype), {"mask": mask})


def present_batch(count: int = 12, *, classes: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch of random images in which classes are present (1), absent (0) or unknown (-1)."""
    rng = _seeded(3)
    present = torch.randint(-1, 2, (count, classes), generator=rng, dtype=torch.int8)
    return batch_of_images(torch.rand(count, 3, 8, 8, generator=rng).to(dtype), {"present": present})


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
