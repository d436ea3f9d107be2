from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.feature_extractor import MAX_GRID_FEATURES, FeatureExtractor, flatten_map, grid_side
from firstlight.tasks.nn.heads import Projection


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder({"name": "convnet", "norm": "batch", "width": 4, "depth": 3}, 16).eval()


def images() -> Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_layer_index_counts_from_either_end() -> None:
    network, x = encoder(), images()
    maps = network(x)
    for layer in range(-3, 3):
        (found,) = FeatureExtractor(network, None, (layer,), "avg")(x)
        torch.testing.assert_close(found, maps[layer].mean((2, 3)))
    several = FeatureExtractor(network, None, (2, 0, -2), "avg")(x)
    assert [f.shape[1] for f in several] == [16, 4, 8]


def test_only_the_layers_that_are_asked_for_are_computed() -> None:
    network = encoder()
    network.stages[1].register_forward_hook(lambda *_: pytest.fail("the second stage was run"))
    assert len(FeatureExtractor(network, None, (0,), "avg")(images())) == 1


@pytest.mark.parametrize("pool", ["avg", "grid", "cls_avg"])
def test_only_the_encoder_computes_in_another_number_format(pool: Any) -> None:
    spec = {"name": "timm", "model": "test_vit"} if pool == "cls_avg" else {"name": "convnet", "width": 4, "depth": 3}
    torch.manual_seed(0)
    network = Encoder(spec, 32).eval()
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (exact,) = FeatureExtractor(network, None, (-1,), pool)(x)
    with torch.autocast("cpu", torch.bfloat16):
        maps = network(x)
    (found,) = FeatureExtractor(network, None, (-1,), pool, torch.bfloat16)(x)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02)
    mean = maps[-1].float()
    expected = {
        "avg": mean.mean((2, 3)),
        "grid": mean.flatten(1),
        "cls_avg": torch.cat((maps.class_tokens[-1].float(), mean.mean((2, 3))), 1) if pool == "cls_avg" else None,
    }
    torch.testing.assert_close(found, expected[pool])


def test_the_head_computes_in_single_precision() -> None:
    network = encoder()
    head = Projection(pooled_size(network, "avg"), (), 7, dropout=0.0, norm="none", pool="avg").eval()
    (found,) = FeatureExtractor(network, head, (-1,), "avg", torch.bfloat16)(images())
    with torch.autocast("cpu", torch.bfloat16):
        map_ = network(images())[-1]
    assert torch.equal(found, head([map_.float()]))


def test_the_grid_is_the_finest_of_at_most_ten_thousand_features() -> None:
    assert grid_side(96, 55, "grid") == 10
    assert grid_side(256, 27, "grid") == 6
    assert grid_side(384, 13, "grid") == 5
    assert grid_side(16, 4, "grid") == 4, "the map as it is"
    assert grid_side(20_000, 4, "grid") == 1
    assert grid_side(16, 4, "avg") == 1
    assert all(
        c * grid_side(c, 60, "grid") ** 2 <= MAX_GRID_FEATURES < c * (grid_side(c, 60, "grid") + 1) ** 2
        for c in (5, 64, 192, 2048)
    )


def test_map_of_the_grids_size_is_flattened() -> None:
    map_ = torch.rand(3, 16, 4, 4)
    assert torch.equal(flatten_map(map_, "grid"), map_.flatten(1))
    coarse = flatten_map(torch.arange(32.0).reshape(1, 2, 4, 4).repeat(1, 1250, 1, 1), "grid")
    assert coarse.shape == (1, 2500 * 4)
    assert coarse[0, :4].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_the_head_is_on_the_deepest_map_and_gives_unit_vectors() -> None:
    network = encoder()
    head = Projection(pooled_size(network, "flatten"), (6,), 7, dropout=0.5, norm="batch", pool="flatten").eval()
    (found,) = FeatureExtractor(network, head, (-1,), "avg")(images())
    assert found.shape == (5, 7)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    direct = torch.nn.functional.normalize(head.layers(network(images())[-1].flatten(1)), dim=1)
    torch.testing.assert_close(found, direct)
