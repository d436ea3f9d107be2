"""The comparison of augmentations: the same views by each, or no numbers."""

import numpy as np
import pytest

from bench import augmentations
from bench.augmentations import AUGMENTATIONS, AugmentationCase, make_smooth_images, measure_augmentations

SMALL = AugmentationCase(20, 14, 9, 5)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_is_measured(name: str) -> None:
    found = measure_augmentations(SMALL, AUGMENTATIONS[name](SMALL.side), 1)
    assert list(found) == ["Pillow", "machine code", "torch"]
    assert all(microseconds > 0 for microseconds in found.values())


def test_other_views_have_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = augmentations.augment_batch
    monkeypatch.setattr(augmentations, "augment_batch", lambda *arguments: 255 - real(*arguments))
    with pytest.raises(ValueError, match="torch makes other views than Pillow"):
        measure_augmentations(SMALL, AUGMENTATIONS["SimCLR"](SMALL.side), 1)


def test_images_are_smooth_and_differ() -> None:
    images = make_smooth_images(AugmentationCase(40, 30, 9, 20)).astype(int)
    assert images.shape == (20, 30, 40, 3)
    assert np.abs(np.diff(images, axis=2)).mean() < 0.3 * images.std()
    assert len({image.tobytes() for image in images}) == augmentations.DISTINCT_IMAGES
