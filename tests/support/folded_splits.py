"""Splits with folds of given sizes."""

from dataclasses import replace

import numpy as np

from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import UserError


def no_folds(name: str) -> np.ndarray:
    raise UserError(f"{name!r} is unknown")


def fold_of(splits: Splits, sizes: list[int]) -> Splits:
    """fold0, fold1, ... of so many training and two held-out images."""
    return replace(splits, subset=lambda name: np.union1d(splits.train[: sizes[int(name[4:])]], splits.val[:2]))
