"""Levels of 8 and 16 bits as tensors and as shares of the highest."""

import numpy as np
import pytest
import torch

from firstlight.tasks.device.pixel_levels import narrow_levels, scale_pixels, send_pixels, widen_levels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_level_keeps_its_value_to_the_network(dtype: type) -> None:
    levels = np.arange(np.iinfo(dtype).max + 1).astype(dtype)
    sent = send_pixels(levels.reshape(1, 16, -1, 1), torch.device("cpu"))
    assert np.array_equal(widen_levels(sent).flatten().numpy(), levels)
    assert torch.equal(narrow_levels(widen_levels(sent), sent.dtype), sent)
    shares = scale_pixels(sent)
    assert shares.shape == (1, 1, 16, len(levels) // 16)
    back = (shares.flatten().double().numpy() * np.iinfo(dtype).max).round()
    assert np.array_equal(back, levels)
    assert len(shares.unique()) == len(levels)
    assert (float(shares.min()), float(shares.max())) == (0.0, 1.0)


def test_tensors_are_taken_as_they_are() -> None:
    tensor = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    assert send_pixels(tensor, torch.device("cpu")) is tensor
