import pytest
import torch

from firstlight.tasks.nn.feature_maps import MapList, join_channels, pool_maps


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def with_tokens(seed: int = 0) -> MapList:
    return MapList(
        [drawn(2, 3, 4, 4, seed=seed + k) for k in range(3)], [drawn(2, 3, seed=9 + seed + k) for k in range(3)]
    )


def test_poolings_equal_their_formulas() -> None:
    maps = with_tokens()
    assert maps.class_tokens is not None
    assert torch.equal(pool_maps(maps, "avg"), maps[2].mean((2, 3)))
    assert torch.equal(pool_maps(maps, "flatten", 0), maps[0].flatten(1))
    assert torch.equal(pool_maps(maps, "cls"), maps.class_tokens[2])
    assert torch.equal(pool_maps(maps, "cls", 1), maps.class_tokens[1])
    assert torch.equal(pool_maps(maps, "cls_avg", 1), torch.cat((maps.class_tokens[1], maps[1].mean((2, 3))), 1))


@pytest.mark.parametrize("pool", ["cls", "cls_avg"])
@pytest.mark.parametrize("plain", [True, False])
def test_missing_class_token_is_a_one_line_error(pool: str, plain: bool) -> None:
    maps = [drawn(1, 2, 2, 2)] if plain else MapList([drawn(1, 2, 2, 2)])
    with pytest.raises(
        ValueError, match=f"^pool: '{pool}' needs a class token, and the encoder has none; valid: avg, flatten$"
    ):
        pool_maps(maps, pool)


def test_class_tokens_follow_the_channels() -> None:
    maps, other = with_tokens(), with_tokens(seed=40)
    joined = join_channels(maps, other)
    assert joined.class_tokens is not None
    assert [tuple(map_.shape) for map_ in joined] == [(2, 6, 4, 4)] * 3
    assert torch.equal(joined.class_tokens[1][:, 3:], other.class_tokens[1])  # type: ignore[index]
    assert join_channels(maps, MapList(other)).class_tokens is None
