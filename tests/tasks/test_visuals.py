import torch

from firstlight.tasks.visuals import stretch_contrast


def test_every_map_is_scaled_to_its_own_range() -> None:
    maps = torch.tensor([[[-3.0, 1.0]], [[5.0, 5.0]], [[0.0, 1e6]]])
    assert stretch_contrast(maps).tolist() == [[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 1.0]]]
