"""Policies: ops that choose other ops for each image, from a pool of ops with ranges of their magnitudes.

Shears, translations and rotations interpolate bilinearly, where torchvision by default and FixMatch's code take the
nearest pixel. Pixels from outside of the image are black, and translations are by whole pixels, as there. Magnitudes
are float64: the float32 of torchvision make 15.999999 of a translation by 16 pixels, and cut it to 15.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from firstlight.pipeline.data.augment.crops import scale_uniform, stack_params
from firstlight.pipeline.data.augment.op_params import (
    NO_OP,
    POLICY_KINDS,
    POLICY_STEP_WIDTH,
    Affine,
    Jitter,
    OpBatch,
    Policy,
)
from firstlight.pipeline.data.augment.pixel_ops import Probability
from firstlight.pipeline.data.augment.pixel_params import AutoContrast, Equalize, Posterize, Sharpness, Solarize
from firstlight.pipeline.data.augment.random_numbers import NUMBERS_PER_OP, CounterRng

# Random numbers for each op that is chosen: the op, its sign, its magnitude, and whether it is applied.
NUMBERS_PER_STEP = 4
MAX_POLICY_OPS = NUMBERS_PER_OP // NUMBERS_PER_STEP
# The probability of an op with random magnitudes, as in FixMatch's code.
RANDOM_OP_P = 0.5


@dataclass(frozen=True)
class PolicyOp:
    """An op of a pool. `build`: (n,) values and the side of the view -> parameters; None: the op changes nothing.

    The value of a magnitude in 0..1 is `base` plus or minus a number from `low` to `high`, minus only if `is_signed`.
    """

    build: Callable[[np.ndarray, int], OpBatch] | None = None
    low: float = 0.0
    high: float = 0.0
    is_signed: bool = False
    base: float = 0.0
    # `low` and `high` are shares of the view's side.
    is_share: bool = False

    def build_batch(self, magnitudes: np.ndarray, signs: np.ndarray, side: int) -> OpBatch | None:
        """Returns the parameters for (n,) magnitudes in 0..1 and (n,) signs, or None."""
        value = scale_uniform(magnitudes, self.low, self.high) * (side if self.is_share else 1)
        return self.build(self.base + (signs * value if self.is_signed else value), side) if self.build else None


def _shear_horizontally(values: np.ndarray, side: int) -> OpBatch:
    return _stack_affine(values, b=values)


def _shear_vertically(values: np.ndarray, side: int) -> OpBatch:
    return _stack_affine(values, d=values)


def _translate_horizontally(values: np.ndarray, side: int) -> OpBatch:
    return _stack_affine(values, c=-_cut_fractions(values))


def _translate_vertically(values: np.ndarray, side: int) -> OpBatch:
    return _stack_affine(values, f=-_cut_fractions(values))


def _cut_fractions(values: np.ndarray) -> np.ndarray:
    """Returns whole numbers, without a fraction of one; that a product was rounded does not count."""
    whole: np.ndarray = np.trunc(np.round(values, 6))
    return whole


def _rotate_about_centre(values: np.ndarray, side: int) -> OpBatch:
    """Rotates by degrees, anticlockwise."""
    angle = -np.radians(values)
    a, b, center = np.cos(angle), np.sin(angle), side / 2
    return stack_params(Affine, a, b, center - a * center - b * center, -b, a, center + b * center - a * center)


def _stack_affine(values: np.ndarray, **entries: np.ndarray) -> OpBatch:
    """Returns affine maps that are the identity but for `entries`."""
    same = {name: np.full(len(values), float(name in "ae")) for name in Affine._fields}
    return stack_params(Affine, *{**same, **entries}.values())


def _change_one_factor(values: np.ndarray, side: int, *, place: int) -> OpBatch:
    """Changes brightness (0), contrast (1) or saturation (2) by factors."""
    rows = np.tile(np.array(Jitter(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0)), (len(values), 1))
    rows[:, place] = values
    return OpBatch(Jitter, rows)


def _keep_bits(values: np.ndarray, side: int, *, rounding: Callable[[np.ndarray], np.ndarray]) -> OpBatch:
    return stack_params(Posterize, rounding(values))


def _invert_above(values: np.ndarray, side: int) -> OpBatch:
    """Inverts levels from thresholds on, of which the rounding of a product must not make the next level."""
    return stack_params(Solarize, np.round(values, 6))


def _build_column(values: np.ndarray, side: int, *, kind: type[Sharpness | Equalize | AutoContrast]) -> OpBatch:
    return stack_params(kind, values)


_brightness, _contrast, _color = (partial(_change_one_factor, place=place) for place in range(3))
_sharpness, _equalize, _autocontrast = (
    partial(_build_column, kind=kind) for kind in (Sharpness, Equalize, AutoContrast)
)


def _build_torchvision_pool(
    shear: float, translation: tuple[float, bool], degrees: float, change: float, bits: float
) -> tuple[PolicyOp, ...]:
    """Returns the pool of torchvision's policies, in its order, from the largest magnitudes.

    `translation`: the largest, and whether it is a share of the side instead of pixels. `bits`: the fewest that remain.
    """
    factors = [PolicyOp(build, 0.0, change, True, 1.0) for build in (_brightness, _color, _contrast, _sharpness)]
    moves = (_translate_horizontally, _translate_vertically)
    return (
        PolicyOp(),
        PolicyOp(_shear_horizontally, 0.0, shear, True),
        PolicyOp(_shear_vertically, 0.0, shear, True),
        *(PolicyOp(build, 0.0, translation[0], True, is_share=translation[1]) for build in moves),
        PolicyOp(_rotate_about_centre, 0.0, degrees, True),
        *factors,
        PolicyOp(partial(_keep_bits, rounding=np.rint), 8.0, bits),
        PolicyOp(_invert_above, 255.0, 0.0),
        PolicyOp(_autocontrast, 1.0, 1.0),
        PolicyOp(_equalize, 1.0, 1.0),
    )


POLICY_POOLS: dict[str, tuple[PolicyOp, ...]] = {
    "torchvision": _build_torchvision_pool(0.3, (150 / 331, True), 30.0, 0.9, 4.0),
    # FixMatch's Table 12, in its order.
    "fixmatch": (
        PolicyOp(_autocontrast, 1.0, 1.0),
        PolicyOp(_brightness, 0.05, 0.95),
        PolicyOp(_color, 0.05, 0.95),
        PolicyOp(_contrast, 0.05, 0.95),
        PolicyOp(_equalize, 1.0, 1.0),
        PolicyOp(),
        PolicyOp(partial(_keep_bits, rounding=np.floor), 4.0, 8.0),
        PolicyOp(_rotate_about_centre, 0.0, 30.0, True),
        PolicyOp(_sharpness, 0.05, 0.95),
        PolicyOp(_shear_horizontally, 0.0, 0.3, True),
        PolicyOp(_shear_vertically, 0.0, 0.3, True),
        PolicyOp(_invert_above, 256.0, 0.0),
        PolicyOp(_translate_horizontally, 0.0, 0.3, True, is_share=True),
        PolicyOp(_translate_vertically, 0.0, 0.3, True, is_share=True),
    ),
}
WIDE_POOL = _build_torchvision_pool(0.99, (32.0, False), 135.0, 0.99, 2.0)


def rand_augment(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    num_ops: Annotated[int, Ge(1), Le(MAX_POLICY_OPS)] = 2,
    magnitude: Annotated[int, Ge(0)] = 9,
    num_magnitude_bins: Annotated[int, Ge(2)] = 31,
    magnitudes: Literal["fixed", "random"] = "fixed",
    pool: Literal["torchvision", "fixmatch"] = "torchvision",
    p: Probability | None = None,
) -> OpBatch:
    """Applies ops that are drawn from a pool for each view (torchvision's RandAugment; Cubuk et al. 2020).

    Shears and rotations are bilinear, where torchvision's default is the nearest pixel.

    `num_ops`: the number of ops, each drawn from the whole pool.
    `magnitude`: the strength of all ops, from 0 to `num_magnitude_bins` - 1. Random magnitudes do not use it.
    `num_magnitude_bins`: the number of strengths that `magnitude` counts in.
    `magnitudes`: `fixed`, as torchvision, or `random`: that of every op uniform in its range, as in FixMatch.
    `pool`: the 14 ops with the ranges of torchvision, or with those of `fixmatch` (its Table 12), where brightness,
    colour, contrast and sharpness only decrease (factors 0.05 to 0.95) and translations are up to 0.3 of the side.
    `p`: the probability of each op. null: 1 with fixed magnitudes, 0.5 with random ones, as in FixMatch's code (in
    TorchSSL it is 1, with three ops).
    """
    drawn = rng.uniform(num_ops * NUMBERS_PER_STEP)
    applied = p if p is not None else RANDOM_OP_P if magnitudes == "random" else 1.0
    steps = []
    for numbers in np.split(drawn, num_ops, axis=1):
        which, sign, share, chance = numbers.T
        strength = share if magnitudes == "random" else magnitude / (num_magnitude_bins - 1)
        steps.append(_build_steps(which, sign, strength, POLICY_POOLS[pool], output_side))
        steps[-1][chance >= applied, 0] = NO_OP
    return OpBatch(Policy, np.hstack(steps))


def trivial_augment(
    rng: CounterRng, sources: np.ndarray, output_side: int, *, num_magnitude_bins: Annotated[int, Ge(2)] = 31
) -> OpBatch:
    """Applies one op of a random strength (torchvision's TrivialAugmentWide; Müller and Hutter 2021).

    Shears and rotations are bilinear, where torchvision's default is the nearest pixel. Translations are by up to 32
    pixels, whatever the size of the view.

    `num_magnitude_bins`: the number of strengths, one of which is drawn.
    """
    which, sign, share = rng.uniform(3).T
    strength = np.floor(share * num_magnitude_bins) / (num_magnitude_bins - 1)
    return OpBatch(Policy, _build_steps(which, sign, strength, WIDE_POOL, output_side))


def _build_steps(
    which: np.ndarray, sign: np.ndarray, strength: np.ndarray | float, pool: tuple[PolicyOp, ...], side: int
) -> np.ndarray:
    """Returns the numbers of one step of a policy, (B, POLICY_STEP_WIDTH), from (B,) random numbers in [0, 1)."""
    rows = np.zeros((len(which), POLICY_STEP_WIDTH))
    rows[:, 0] = NO_OP
    strengths, chosen = np.broadcast_to(strength, which.shape), (which * len(pool)).astype(np.int64)
    for place, op in enumerate(pool):
        own = np.flatnonzero(chosen == place)
        batch = op.build_batch(strengths[own], np.where(sign[own] < 0.5, -1.0, 1.0), side)
        if batch is not None:
            rows[own, 0] = [kind is batch.kind for kind in POLICY_KINDS].index(True)
            rows[own, 1 : 1 + batch.rows.shape[1]] = batch.rows
    return rows
