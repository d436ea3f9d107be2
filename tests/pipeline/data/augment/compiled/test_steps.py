"""The ops of a batch as numbers."""

import numpy as np

from firstlight.pipeline.data.augment.compiled import steps
from firstlight.pipeline.data.augment.compiled.steps import STEP_KINDS, STEP_WIDTH, pack_steps
from firstlight.pipeline.data.augment.op_params import NO_OP, CropBox, Jitter, OpParams, Policy
from firstlight.pipeline.data.augment.ops import sample_params
from firstlight.pipeline.data.augment.pixel_params import BLUR_WEIGHT_SUM
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from tests.support.augmentations import PIPELINES


def draw(name: str, count: int) -> list[steps.OpBatch]:
    ids = np.arange(count)
    return sample_params(PIPELINES[name], derive_view_keys(0, ids, ids, 0), np.tile((30, 20), (count, 1)), 16)


def test_kinds_have_the_numbers_of_their_names() -> None:
    kinds: tuple[type[OpParams], ...] = STEP_KINDS
    assert len(set(kinds)) == len(kinds) == 15
    names = {kind.__name__: number for number, kind in enumerate(kinds)}
    assert names == {
        "CropBox": steps.CROP_BOX_STEP,
        "Shift": steps.SHIFT_STEP,
        "Fit": steps.FIT_STEP,
        "Flip": steps.FLIP_STEP,
        "VerticalFlip": steps.VERTICAL_FLIP_STEP,
        "Affine": steps.AFFINE_STEP,
        "Jitter": steps.JITTER_STEP,
        "Grayscale": steps.GRAYSCALE_STEP,
        "Blur": steps.BLUR_STEP,
        "Solarize": steps.SOLARIZE_STEP,
        "Posterize": steps.POSTERIZE_STEP,
        "Equalize": steps.EQUALIZE_STEP,
        "AutoContrast": steps.AUTO_CONTRAST_STEP,
        "Sharpness": steps.SHARPNESS_STEP,
        "Erase": steps.ERASE_STEP,
    }


def test_steps_are_the_parameters_of_the_ops() -> None:
    ops = draw("simclr", 7)
    numbers, weights = pack_steps(ops)
    assert numbers.shape == (7, 6, STEP_WIDTH)
    for k, op in enumerate(ops):
        assert (numbers[:, k, 0] == STEP_KINDS.index(op.kind)).all()
        assert np.array_equal(numbers[:, k, 1 : 1 + op.rows.shape[1]], op.rows)
    blurred = ops[4].rows[:, 0] > 0.0
    assert 0 < blurred.sum() < 7
    assert (weights[blurred, 4, 0] + 2 * weights[blurred, 4, 1:].sum(1) == BLUR_WEIGHT_SUM).all()
    assert not weights[~blurred, 4].any()
    assert not weights[:, :4].any()


def test_a_policy_has_a_step_for_each_of_its_ops() -> None:
    ops = draw("many ops", 9)
    numbers, _ = pack_steps(ops)
    assert numbers.shape[1] == 1 + 16
    for image, (crop, policy) in enumerate(zip(*(op.params_per_image() for op in ops), strict=True)):
        assert isinstance(policy, Policy)
        assert tuple(numbers[image, 0, 1:5]) == crop
        kept = [step for step in numbers[image, 1:] if step[0] != NO_OP]
        assert [STEP_KINDS[int(step[0])] for step in kept] == [type(step) for step in policy.steps]
        assert [tuple(step[1 : 1 + len(own)]) for step, own in zip(kept, policy.steps, strict=True)] == list(
            policy.steps
        )


def test_rows_are_wide_enough_for_every_kind() -> None:
    assert 1 + len(Jitter._fields) == STEP_WIDTH
    assert len(CropBox._fields) < STEP_WIDTH
