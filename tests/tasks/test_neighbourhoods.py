import pytest
import torch

from firstlight.tasks.neighbourhoods import measure_consistency, select_neighbours


def test_images_of_lowest_entropy_are_selected_with_their_neighbours() -> None:
    nearest, entropy = torch.tensor([3, 2, 1, 0, 1]), torch.tensor([0.5, 0.1, 0.9, 0.1, 0.7])
    assert select_neighbours(nearest, entropy, 0).tolist() == [-1] * 5
    assert select_neighbours(nearest, entropy, 1).tolist() == [-1, 2, -1, -1, -1], "of equal ones the lowest row"
    assert select_neighbours(nearest, entropy, 3).tolist() == [3, 2, -1, 0, -1]
    assert select_neighbours(nearest, entropy, 5).tolist() == nearest.tolist()


@pytest.mark.parametrize(
    ("labels", "share"),
    [([1, 0, 0, 1, 0], 1.0), ([1, 0, 1, 1, 0], 2 / 3), ([1, 0, -1, 0, 0], 0.0), ([-1, -1, -1, 2, 0], 0.0)],
)
def test_consistency_is_over_selected_images_with_known_labels(labels: list[int], share: float) -> None:
    """Selected are the pairs (0, 3), (1, 2) and (3, 0); the neighbour of image 4 is not."""
    neighbour = torch.tensor([3, 2, -1, 0, -1])
    assert measure_consistency(neighbour, torch.tensor(labels)) == pytest.approx(share)
