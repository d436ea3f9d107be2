import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.collective import select_own_rows
from firstlight.tasks.nn.norms import BatchNorm, SyncBatchNorm, norm_layer
from tests.support.gloo import Pool

SHAPES = [(8, 5), (6, 5, 3, 4)]


def prepared(cls: type[nn.Module], channels: int) -> nn.Module:
    """A layer in float64 with weights and statistics that are not 0 or 1."""
    layer = cls(channels).double()
    for k, tensor in enumerate((*layer.parameters(), layer.running_mean, layer.running_var)):
        assert isinstance(tensor, Tensor)
        tensor.data = 0.5 + torch.rand(channels, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return layer


def joined(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A global batch with a mean far from zero, and the weights of the sum that is differentiated."""
    rng = torch.Generator().manual_seed(9)
    return 3 + torch.randn(shape, generator=rng, dtype=torch.float64), torch.randn(
        shape, generator=rng, dtype=torch.float64
    )


def results(layer: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * weights).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {f"grad of {name}": p.grad for name, p in layer.named_parameters()}
    gradients["grad of input"] = x.grad
    return {"out": out.detach(), **gradients, **dict(layer.named_buffers())}  # type: ignore[dict-item]


def sync_on_this_rank(shape: tuple[int, ...], steps: int, training: bool) -> dict[str, Tensor]:
    layer = prepared(SyncBatchNorm, shape[1]).train(training)
    x, weights = joined(shape)
    for _ in range(steps - 1):
        layer(select_own_rows(x))
    return results(layer, select_own_rows(x), select_own_rows(weights))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_workers_equal_torch_on_the_joined_batch(pool: Pool, shape: tuple[int, ...], training: bool) -> None:
    layer = prepared(nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d, shape[1]).train(training)
    x, weights = joined(shape)
    layer(x)
    expected = results(layer, x, weights)
    answers = pool.run(sync_on_this_rank, shape, 2, training)
    for name, value in expected.items():
        parts = [answer[name] for answer in answers]
        if name in ("out", "grad of input"):
            torch.testing.assert_close(torch.cat(parts), value, rtol=1e-10, atol=1e-12)
        elif name.startswith("grad"):  # of this worker's rows: the loop averages over workers
            torch.testing.assert_close(parts[0] + parts[1], value, rtol=1e-10, atol=1e-12)
        else:
            for part in parts:
                torch.testing.assert_close(part, value, rtol=1e-10, atol=1e-12)


def test_global_statistics_differ_from_local_ones() -> None:
    """Otherwise the test above could pass with statistics of each worker."""
    x, weights = joined(SHAPES[0])
    whole, part = (results(prepared(BatchNorm, 5), rows, weights[: len(rows)])["out"] for rows in (x, x[:4]))
    assert (whole[:4] - part).abs().max() > 0.1


def precision_on_this_rank() -> tuple[torch.dtype, float]:
    x = (1000 + torch.randn(64, 3, generator=torch.Generator().manual_seed(0))).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = SyncBatchNorm(3)(select_own_rows(x))
    return out.dtype, float(out.double().std())


def test_variance_is_exact_for_a_large_mean_under_autocast(pool: Pool) -> None:
    for dtype, std in pool.run(precision_on_this_rank):
        assert dtype == torch.float32
        assert std == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["batch", "sync"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sync_norm_on_one_worker_equals_torchs(kind: str, shape: tuple[int, ...]) -> None:
    torchs = prepared(nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d, shape[1])
    ours = prepared(SyncBatchNorm if kind == "sync" else BatchNorm, shape[1])
    for name, value in results(torchs, *joined(shape)).items():
        assert torch.equal(results(prepared(type(ours), shape[1]), *joined(shape))[name], value), name


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (6, 6), (31, 31), (32, 32), (33, 11), (37, 1), (48, 24), (64, 32), (96, 32), (384, 32)],
)
def test_group_takes_the_most_groups_that_divide_the_channels(channels: int, groups: int) -> None:
    layer = norm_layer("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == groups
    assert layer(torch.rand(2, channels, 3, 3)).shape == (2, channels, 3, 3)


def test_norm_layer_is_selected_by_name() -> None:
    assert type(norm_layer("batch", 4)) is BatchNorm
    assert type(norm_layer("sync", 4)) is SyncBatchNorm
