"""Views that compiled ops make, and those that Pillow makes by the same parameters."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
from PIL import Image

from firstlight.pipeline.data.augment.compiled.loading import CompiledOps, compiled_ops
from firstlight.pipeline.data.augment.compiled.steps import MakeViews, pack_steps
from firstlight.pipeline.data.augment.op_params import OpBatch, OpParams
from firstlight.pipeline.data.augment.ops import apply_params


@functools.cache
def compile_views() -> MakeViews:
    """Returns the compiled function of this process; the first process of a changed checkout compiles it."""
    ops = CompiledOps()
    assert ops.load() == ""
    found = ops.find()
    assert found is not None
    return found


@contextlib.contextmanager
def use_compiled_ops(used: bool) -> Iterator[None]:
    """Has this process make all views by compiled ops, or none, however many it has made."""
    found = compile_views() if used else None
    with mock.patch.multiple(compiled_ops, _make_views=found, obstacle="" if used else "a test"):
        yield


def draw_batch(*ops: OpParams, count: int = 1) -> list[OpBatch]:
    """The same parameters for each of `count` images."""
    return [OpBatch(type(op), np.tile(np.array([op], np.float64), (count, 1))) for op in ops]


def make_compiled(pixels: np.ndarray, ops: Sequence[OpBatch], size: int) -> np.ndarray:
    """Returns (B, size, size, 3) views of (B, H, W, C) images."""
    views = np.empty((len(pixels), size, size, 3), np.uint8)
    compile_views()(np.ascontiguousarray(pixels), *pack_steps(ops), views)
    return views


def make_by_pillow(pixels: np.ndarray, ops: Sequence[OpBatch], size: int) -> np.ndarray:
    """Returns (B, size, size, 3) views of (B, H, W, 3) images."""
    params = zip(*(op.params_per_image() for op in ops), strict=True)
    return np.stack([apply_params(Image.fromarray(own), p, size) for own, p in zip(pixels, params, strict=True)])
