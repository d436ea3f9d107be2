import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import firstlight.tasks.memory_bank
from firstlight.tasks.collective import gather_over_workers, rank, world_size
from firstlight.tasks.memory_bank import MemoryBank, draw_initial_rows, draw_spread_rows
from firstlight.tasks.sample_table import SampleTable
from tests.support import references
from tests.support.gloo import Pool

# The own row's part in the entropy: none, a constant logit, or that of all other rows.
OwnClass = float | Literal["all"] | None
OWN_CLASSES = pytest.mark.parametrize("own_class", [None, -10.0, "all"])


def rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bank(size: int = 13, dim: int = 4, chunk: int = 5, seed: int = 0, unit: bool = True) -> MemoryBank:
    """A bank in float64 with this worker's shard of the same rows, on any number of workers."""
    memory = MemoryBank(size, dim, seed, chunk)
    everything = rows(size, dim, seed)
    memory.values = (F.normalize(everything, dim=1) if unit else everything)[memory.own_rows].contiguous()
    return memory


def naive(
    queries: Tensor, everything: Tensor, own: Tensor, temperature: float, own_class: OwnClass
) -> tuple[Tensor, Tensor]:
    """Computes `MemoryBank.contrast_others` with a (b, n) tensor, for autograd."""
    logits = queries @ everything.T / temperature
    itself = F.one_hot(own, len(everything)).bool()
    lse = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    if own_class != "all":
        logits = logits.masked_fill(itself, -1e9 if own_class is None else own_class)
    log_p = logits.log_softmax(1)
    return lse, -(log_p.exp() * log_p).sum(1)


def contrast(
    memory: MemoryBank, queries: Tensor, own: Tensor, temperature: float, own_class: OwnClass
) -> tuple[Tensor, Tensor]:
    """Calls `MemoryBank.contrast_others`, for "all" with the own rows."""
    given = memory.values[own] if isinstance(own_class, str) else own_class
    return memory.contrast_others(queries, own, temperature, given)


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@OWN_CLASSES
@pytest.mark.parametrize("unit", [True, False])
def test_the_pass_is_the_softmax_over_the_other_rows(chunk: int, own_class: OwnClass, unit: bool) -> None:
    memory, own = bank(chunk=chunk, unit=unit), torch.tensor([0, 12, 4, 7])
    queries = F.normalize(rows(4, 4, 1), dim=1).requires_grad_()
    found = contrast(memory, queries, own, 0.3, own_class)
    wanted = naive(queries, memory.values, own, 0.3, own_class)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        mine, its = (torch.autograd.grad(x.square().sum(), queries, retain_graph=True)[0] for x in (ours, theirs))
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


@OWN_CLASSES
def test_entropy_equals_its_formula(own_class: OwnClass) -> None:
    """None is eq. 11 of the paper, -10 the authors' code, and "all" their first commit."""
    memory, queries = bank(), F.normalize(rows(3, 4, 1), dim=1)
    entropy = contrast(memory, queries, torch.tensor([2, 5, 3]), 0.2, own_class)[1].mean()
    assert float(entropy) == pytest.approx(
        references.super_and_entropy([queries], [2, 5, 3], memory.values, 0.2, own_class), rel=1e-10
    )


@OWN_CLASSES
def test_gradcheck(own_class: OwnClass) -> None:
    memory, own = bank(), torch.tensor([3, 9])
    assert torch.autograd.gradcheck(
        lambda x: contrast(memory, F.normalize(x, dim=1), own, 0.5, own_class), (rows(2, 4, 1).requires_grad_(),)
    )


# Row 4 is drawn twice and is a query's own, as rows 0 and 7 are.
SAMPLE = np.array([0, 4, 4, 7, 9, 11])


@pytest.mark.parametrize("chunk", [1, 4, 100])
@OWN_CLASSES
def test_sampled_sums_are_those_over_the_sample_times_size_over_its_length(chunk: int, own_class: OwnClass) -> None:
    memory, own = bank(chunk=chunk), torch.tensor([0, 12, 4, 7])
    queries = F.normalize(rows(4, 4, 1), dim=1).requires_grad_()
    given = memory.values[own] if isinstance(own_class, str) else own_class
    found = memory.contrast_others(queries, own, 0.3, given, SAMPLE)
    others = (queries @ memory.values[torch.from_numpy(SAMPLE)].T / 0.3).masked_fill(
        own[:, None] == torch.from_numpy(SAMPLE), -torch.inf
    )
    # A row that stands for 13 / 6 rows has so much more weight.
    weights = torch.full_like(others, 13 / 6)
    partition = (weights * others.exp()).sum(1).log()
    logits = [others.masked_fill(own[:, None] == torch.from_numpy(SAMPLE), 0.0)]
    weights = weights.masked_fill(own[:, None] == torch.from_numpy(SAMPLE), 0.0)
    if own_class is not None:
        itself = (queries * memory.values[own]).sum(1) / 0.3 if own_class == "all" else torch.full((4,), own_class)
        logits, weights = [*logits, itself[:, None]], torch.cat((weights, torch.ones(4, 1)), 1)
    joined = torch.cat(logits, 1)
    p = weights * joined.exp()
    total = p.sum(1, keepdim=True)
    entropy = total[:, 0].log() - (p / total * joined).sum(1)
    for ours, theirs in zip(found, (partition, entropy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        mine, its = (torch.autograd.grad(x.square().sum(), queries, retain_graph=True)[0] for x in (ours, theirs))
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


@OWN_CLASSES
def test_gradcheck_of_the_estimate(own_class: OwnClass) -> None:
    memory, own = bank(), torch.tensor([3, 9])
    given = memory.values[own] if isinstance(own_class, str) else own_class
    assert torch.autograd.gradcheck(
        lambda x: memory.contrast_others(F.normalize(x, dim=1), own, 0.5, given, SAMPLE),
        (rows(2, 4, 1).requires_grad_(),),
    )


def test_sum_over_drawn_rows_estimates_the_sum_over_all_without_bias() -> None:
    """The mean of the estimated partition over 4,000 steps is the exact one, and every row is drawn equally often."""
    memory, own = bank(), torch.tensor([0, 12, 4, 7])
    queries = F.normalize(rows(4, 4, 1), dim=1)
    drawn = [draw_spread_rows(5, 13, seed=3, step=step) for step in range(4000)]
    estimates = torch.stack([memory.contrast_others(queries, own, 0.3, None, sample)[0].exp() for sample in drawn])
    exact = memory.contrast_others(queries, own, 0.3)[0].exp()
    error = estimates.std(0) / 4000**0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.02 * exact).all(), "else the test sees nothing"
    counts = np.bincount(np.concatenate(drawn), minlength=13) / 4000
    assert counts.tolist() == pytest.approx([5 / 13] * 13, abs=0.04)


@given(st.integers(1, 200), st.integers(1, 10**9), st.integers(0, 2**31), st.integers(0, 10**6))
def test_one_row_is_drawn_of_each_interval(count: int, more: int, seed: int, step: int) -> None:
    size = count + more
    drawn = draw_spread_rows(count, size, seed, step)
    # The bounds of the intervals in whole numbers, from below and from above.
    below = [k * size // count for k in range(count)]
    above = [-(-(k + 1) * size // count) - 1 for k in range(count)]
    assert all(low <= row <= high for low, row, high in zip(below, drawn.tolist(), above, strict=True))
    assert np.array_equal(drawn, draw_spread_rows(count, size, seed, step))
    assert np.unique(drawn, return_counts=True)[1].max() <= 2


def test_another_step_draws_other_rows() -> None:
    assert not np.array_equal(draw_spread_rows(50, 10_000, 0, 1), draw_spread_rows(50, 10_000, 0, 2))
    assert not np.array_equal(draw_spread_rows(50, 10_000, 0, 1), draw_spread_rows(50, 10_000, 1, 1))


SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def narrow_bank(dtype: torch.dtype, size: int = 300) -> MemoryBank:
    """Returns a bank of unit rows, this worker's shard of them, stored in 16 bits."""
    memory = MemoryBank(size, 32, 0, 70, dtype)
    memory.values = F.normalize(rows(size, 32, 0), dim=1)[memory.own_rows].to(dtype)
    return memory


@SIXTEEN_BITS
def test_bank_in_16_bits_computes_in_32(dtype: torch.dtype) -> None:
    """The results are those of a bank of 32 bits with the same rounded rows, to the last digits."""
    memory, wide = narrow_bank(dtype), narrow_bank(dtype)
    wide.values = memory.values.float()
    own, queries = torch.arange(0, 160, 10), F.normalize(rows(16, 32, 1), dim=1).float()
    for ours, theirs in zip(
        (*memory.contrast_others(queries, own, 0.1), *memory.find_neighbours(0.1), memory.gram_matrix()),
        (*wide.contrast_others(queries, own, 0.1), *wide.find_neighbours(0.1), wide.gram_matrix()),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert memory.values.nbytes * 2 == wide.values.nbytes


@SIXTEEN_BITS
def test_gram_matrix_follows_the_rounded_rows(dtype: torch.dtype) -> None:
    memory = narrow_bank(dtype)
    gram = memory.gram_matrix()
    for step in range(20):
        memory.write(torch.randperm(300)[:64], F.normalize(rows(64, 32, step), dim=1).float())
        gram += memory.commit_gram_change()
    assert memory.values.dtype == dtype
    torch.testing.assert_close(gram, memory.gram_matrix(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.001, 0.1, 100.0])
def test_float32_is_close_to_float64_at_any_temperature(temperature: float) -> None:
    memory, own = bank(size=3000, dim=32, chunk=700), torch.arange(0, 160, 10)
    wide = F.normalize(memory.values[own] + 0.5 * rows(16, 32, 1), dim=1).requires_grad_()
    wanted = naive(wide, memory.values, own, temperature, None)
    (wanted[0].mean() + wanted[1].mean()).backward()
    memory.values = memory.values.float()
    narrow = wide.detach().float().requires_grad_()
    found = memory.contrast_others(narrow, own, temperature)
    (found[0].mean() + found[1].mean()).backward()
    for ours, theirs in zip((*found, narrow.grad), (*wanted, wide.grad), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-4 * (temperature < 0.01)


def test_own_row_has_no_weight() -> None:
    memory, own = bank(), torch.tensor([0, 1])
    queries = memory.values[:2].clone()
    before = memory.contrast_others(queries, own, 0.01)[0][0]
    memory.values[0] *= 100.0  # its logit is now 10,000: were it the peak, all others would vanish
    assert float(memory.contrast_others(queries, own, 0.01)[0][0]) == pytest.approx(float(before), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_discovery_is_exact(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firstlight.tasks.memory_bank, "NEIGHBOUR_QUERY_BLOCK", 3)
    memory = bank(size=17, chunk=chunk)
    nearest, entropy = memory.find_neighbours(0.2)
    wanted, entropies = references.super_and_neighbours(memory.values, 0.2)
    assert nearest.tolist() == wanted
    assert entropy.tolist() == pytest.approx(entropies, rel=1e-10)


def features_of_images(size: int) -> SampleTable:
    """A table of f(x), other than the bank, with this worker's shard of the same rows on any number of workers."""
    everything = F.normalize(rows(size, 4, 5), dim=1)
    return SampleTable(size, (4,), torch.float64, lambda ids: everything[ids])


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_discovery_by_features_compares_them_and_takes_the_entropy_over_the_bank(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firstlight.tasks.memory_bank, "NEIGHBOUR_QUERY_BLOCK", 3)
    memory, features = bank(size=17, chunk=chunk), features_of_images(17)
    nearest, entropy = memory.find_neighbours(0.2, features)
    wanted, entropies = references.super_and_neighbours(memory.values, 0.2, features.values)
    assert nearest.tolist() == wanted != references.super_and_neighbours(memory.values, 0.2)[0]
    assert entropy.tolist() == pytest.approx(entropies, rel=1e-10)


@given(st.integers(2, 20), st.integers(1, 7), st.integers(0, 1000))
def test_neighbour_is_another_row_and_the_lowest_of_equal_ones(size: int, chunk: int, seed: int) -> None:
    memory = bank(size=size, dim=2, chunk=chunk, seed=seed)
    memory.values = F.one_hot(torch.arange(size) % 2, 2).double()  # all even ids are equal, and all odd ones
    nearest, _ = memory.find_neighbours(0.1)
    wanted = [next(j for j in (*range(i % 2, size, 2), 1 - i % 2) if j != i) for i in range(size)]
    assert nearest.tolist() == wanted


def on_workers() -> list[Tensor]:
    """Returns this worker's results for its part of six queries.

    They are the queries' gradients, the entropy over all rows, the sums over a sample, the neighbours, the entropies,
    both by features other than the bank's, and the Gram matrix before and after a write.
    """
    memory, part = bank(chunk=2), slice(rank() * 6 // world_size(), (rank() + 1) * 6 // world_size())
    own = torch.tensor([12, 1, 5, 6, 2, 10])[part]
    queries = F.normalize(rows(6, 4, 1), dim=1)[part].requires_grad_()
    found = memory.contrast_others(queries, own, 0.3, -10.0)
    (found[0].sum() + found[1].square().sum()).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firstlight.tasks.memory_bank, "NEIGHBOUR_QUERY_BLOCK", 2)
        nearest, entropy = memory.find_neighbours(0.3)
        by_features = memory.find_neighbours(0.3, features_of_images(13))
    whole = memory.contrast_others(queries.detach(), own, 0.3, memory.read(own))
    sampled = memory.contrast_others(queries.detach(), own, 0.3, -10.0, SAMPLE)
    # All rows of this sample are in the shard of one of two workers.
    even = memory.contrast_others(queries.detach(), own, 0.3, None, np.array([0, 2, 4, 10]))
    before = memory.gram_matrix()
    memory.write(own, queries)
    after = before + memory.commit_gram_change()
    assert queries.grad is not None
    return [
        *(gather_over_workers(x.detach()) for x in (*found, queries.grad, whole[1], *sampled, *even)),
        nearest,
        entropy,
        *by_features,
        before,
        after,
        memory.gram_matrix(),
    ]


@pytest.mark.parametrize("workers", ["pool", "pool3"])
def test_moments_are_equal_on_any_number_of_workers(workers: str, request: pytest.FixtureRequest) -> None:
    wanted = on_workers()
    pool: Pool = request.getfixturevalue(workers)
    for answer in pool.run(on_workers):
        for ours, theirs in zip(answer, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(wanted[-1], wanted[-2], rtol=1e-12, atol=1e-12)


def read_narrow_rows(dtype: torch.dtype) -> list[Tensor]:
    """Returns all rows, the neighbours and the entropies of a bank in 16 bits, on this worker."""
    memory = narrow_bank(dtype, size=31)
    part = torch.arange(31 - 31 % world_size()).chunk(world_size())[rank()]
    memory.write(part, F.normalize(rows(31, 32, 5), dim=1)[part].float())
    memory.commit()
    return [
        memory.gather_values().float(),
        gather_over_workers(memory.read(part)).float(),
        *memory.find_neighbours(0.2),
    ]


@SIXTEEN_BITS
def test_bank_in_16_bits_is_equal_on_two_workers(pool: Pool, dtype: torch.dtype) -> None:
    for answer in pool.run(read_narrow_rows, dtype):
        rows_of_all, read, nearest, entropy = answer
        assert torch.equal(rows_of_all[:30], read)
        assert torch.equal(rows_of_all[:30], F.normalize(rows(31, 32, 5), dim=1)[:30].to(dtype).float())
        wanted = narrow_bank(dtype, size=31)
        wanted.values = rows_of_all.to(dtype)
        assert torch.equal(nearest, wanted.find_neighbours(0.2)[0])
        torch.testing.assert_close(entropy, wanted.find_neighbours(0.2)[1])


def empty_shards() -> list[Tensor]:
    """A bank of two rows: the third of three workers has none."""
    memory = bank(size=2)
    nearest, entropy = memory.find_neighbours(0.3)
    partition, _ = memory.contrast_others(F.normalize(rows(1, 4, 1), dim=1), torch.tensor([0]), 0.3)
    return [nearest, entropy, partition, memory.gram_matrix()]


def test_worker_may_own_no_row(pool3: Pool) -> None:
    wanted = empty_shards()
    assert wanted[0].tolist() == [1, 0]
    for answer in pool3.run(empty_shards):
        for ours, theirs in zip(answer, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True), st.integers(0, 1000))
def test_only_written_rows_change_and_the_gram_matrix_follows(ids: list[int], seed: int) -> None:
    memory = MemoryBank(13, 4, seed, 5)
    gram, before = memory.gram_matrix(), memory.values.clone()
    memory.write(torch.tensor(ids), F.normalize(rows(len(ids), 4, seed), dim=1))
    assert torch.equal(memory.values, before), "a write waits for the end of the step"
    gram += memory.commit_gram_change()
    assert torch.equal(memory.commit_gram_change(), torch.zeros(4, 4, dtype=torch.float64)), "a write counts once"
    assert torch.equal(memory.state_dict()["rows"], memory.values), "nothing is pending"
    kept = torch.ones(13, dtype=torch.bool)
    kept[ids] = False
    assert torch.equal(memory.values[kept], before[kept])
    assert torch.allclose(memory.values[ids].norm(dim=1), torch.ones(len(ids)), atol=1e-6)
    torch.testing.assert_close(gram, memory.gram_matrix(), rtol=1e-12, atol=1e-12)


def test_the_gram_matrix_does_not_drift() -> None:
    memory = MemoryBank(500, 32, 0, 100)
    gram = memory.gram_matrix()
    for step in range(200):
        memory.write(torch.randperm(500)[:64], F.normalize(rows(64, 32, step), dim=1))
        gram += memory.commit_gram_change()
    exact = memory.gram_matrix()
    assert (gram - exact).norm() / exact.norm() <= 1e-10


def test_initial_rows_depend_on_seed_and_row_only() -> None:
    ids = torch.tensor([0, 7, 8191, 8192, 20_000])
    together = draw_initial_rows(ids, 16, 3)
    assert torch.equal(together, torch.cat([draw_initial_rows(i[None], 16, 3) for i in ids]))
    assert torch.equal(together.flip(0), draw_initial_rows(ids.flip(0), 16, 3))
    assert not torch.equal(together, draw_initial_rows(ids, 16, 4))


def test_initial_rows_are_uniform() -> None:
    drawn = draw_initial_rows(torch.arange(20_000), 12, 0)
    assert drawn.abs().max() <= 0.5  # sqrt(3 / 12)
    assert drawn.square().sum(1).mean() == pytest.approx(1.0, abs=0.01)
    assert drawn.mean(0).abs().max() < 0.01


MEASURE = """
import torch
from firstlight.tasks.memory_bank import MemoryBank

def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def step(bank):
    queries = torch.nn.functional.normalize(torch.randn(256, 128), dim=1).requires_grad_()
    partition, entropy = bank.contrast_others(queries, torch.randint(bank.size, (256,)), 0.1)
    (partition.mean() + entropy.mean()).backward()

torch.set_num_threads(1)
step(MemoryBank(300, 128, 0, 8192))
bank = MemoryBank(2, 128, 0, 8192)
bank.size, bank.values = 400_000, torch.empty(400_000, 128).uniform_(-0.15, 0.15)
before = kib("VmRSS:")
step(bank)
print((kib("VmHWM:") - before) / 1024)
"""


def test_pass_over_the_bank_needs_little_memory() -> None:
    """The pass takes 256 queries over 400,000 rows: a (256, n) tensor alone would be 390 MiB."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert 8 < float(done.stdout) <= 128  # MiB; two tiles of 256 x 8192 are 16
