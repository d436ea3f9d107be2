import pytest
import torch
from torchvision.ops import box_iou

from firstlight.tasks.downstream.windows import sliding_windows


@pytest.mark.parametrize(("size", "sides"), [(224, (32, 64, 128)), (97, (16, 40))])
def test_windows_overlap_every_object_of_their_scales_by_half(size: int, sides: tuple[int, ...]) -> None:
    """Fast R-CNN learns from windows that overlap an object by at least half."""
    found = sliding_windows(size, sides)
    rng = torch.Generator().manual_seed(0)
    for side in sides:
        corner = torch.rand(200, 2, generator=rng) * (size - side)
        objects = torch.cat((corner, corner + side), 1)
        assert float(box_iou(objects, found).max(1).values.min()) > 0.5


def test_windows_have_the_areas_and_the_shapes_and_stay_in_the_image() -> None:
    found = sliding_windows(64, (16,))
    assert found.shape == (3 * 16 * 16, 4)
    assert float(found.min()) == 0
    assert float(found.max()) == 64
    width, height = (found[:, 2] - found[:, 0]), (found[:, 3] - found[:, 1])
    assert bool((width > 0).all())
    assert bool((height > 0).all())
    inner = (found[:, 0] > 0) & (found[:, 1] > 0) & (found[:, 2] < 64) & (found[:, 3] < 64)
    assert torch.allclose((width * height)[inner], torch.tensor(256.0))
    assert sorted({round(float(r), 3) for r in (height / width)[inner]}) == [0.5, 1.0, 2.0]


def test_window_larger_than_the_image_is_clipped_to_it() -> None:
    assert torch.equal(sliding_windows(10, (40,))[1], torch.tensor([0.0, 0.0, 10.0, 10.0]))
