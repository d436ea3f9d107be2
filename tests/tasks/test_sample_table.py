import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlight.tasks.collective import gather_over_workers, rank, world_size
from firstlight.tasks.sample_table import SampleTable
from tests.support.gloo import Pool


def table(size: int = 11) -> SampleTable:
    return SampleTable(size, (2,), torch.float32, lambda ids: torch.stack((ids, -ids), 1))


def shard_of(size: int, rank_: int, world_: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(size)[rank_::world_]
    return {"ids": ids, "rows": torch.stack((ids + 0.5, -ids + 0.25), 1)}


def test_write_is_visible_after_commit() -> None:
    t = table()
    t.write(torch.tensor([4, 2]), torch.tensor([[9.0, 9.0], [8.0, 8.0]]))
    assert t.read(torch.tensor([2, 4])).tolist() == [[2, -2], [4, -4]]
    t.commit()
    assert t.read(torch.tensor([2, 4])).tolist() == [[8, 8], [9, 9]]
    assert t.read(torch.tensor([0, 10])).tolist() == [[0, 0], [10, -10]]


@pytest.mark.fault(36, "an id outside of a table")
@pytest.mark.parametrize("bad", [-1, 11])
def test_row_outside_of_the_table_raises(bad: int) -> None:
    with pytest.raises(IndexError, match=str(bad)):
        table().read(torch.tensor([1, bad]))


@pytest.mark.parametrize("ids", [[], [3], [3, 0, 3]])
def test_read_returns_a_copy(ids: list[int]) -> None:
    t = table()
    t.read(torch.tensor(ids, dtype=torch.int64)).fill_(100.0)
    assert torch.equal(t.values, table().values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_table_does_not_synchronise_the_gpu() -> None:
    t = table().to(torch.device("cuda"))
    ids, rows = torch.tensor([4, 2], device="cuda"), torch.full((2, 2), 9.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        t.write(ids, t.read(ids) + rows)
        t.commit()
        found = t.read(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == [[13, 5], [11, 7]]


@given(st.integers(1, 30), st.integers(1, 5), st.randoms())
def test_shards_of_any_number_of_workers_are_taken(size: int, writers: int, random: object) -> None:
    shards = [shard_of(size, r, writers) for r in range(writers)]
    random.shuffle(shards)  # type: ignore[attr-defined]
    t = table(size)
    t.load_state_dicts(shards)
    assert torch.equal(t.values[:, 0], torch.arange(size) + 0.5)


@given(st.integers(2, 30), st.integers(2, 5))
def test_missing_shard_raises(size: int, writers: int) -> None:
    shards = [shard_of(size, r, min(writers, size)) for r in range(min(writers, size))]
    with pytest.raises(ValueError, match="missing or foreign"):
        table(size).load_state_dicts(shards[1:])
    with pytest.raises(ValueError, match="missing or foreign"):
        table(size).load_state_dicts([*shards, shards[0]])


def test_rows_of_another_shape_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        table(4).load_state_dicts([{"ids": torch.arange(4), "rows": torch.zeros(4, 3)}])


def on_two_workers() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    t = table()
    ids = torch.tensor([[0, 3, 7], [10, 1, 4]])[rank()]
    before = t.read(ids)
    t.write(ids, before + 100 * (rank() + 1))
    t.commit()
    return before, gather_over_workers(t.read(ids)), t.state_dict()


def test_two_workers_read_and_write_each_others_rows(pool: Pool) -> None:
    answers = pool.run(on_two_workers)
    assert answers[0][0][:, 0].tolist() == [0, 3, 7]
    assert answers[1][0][:, 0].tolist() == [10, 1, 4]
    for _, after, _ in answers:
        assert after[:, 0].tolist() == [100, 103, 107, 210, 201, 204]
    one = table()
    one.load_state_dicts([a[2] for a in answers])
    assert one.values[:, 0].tolist() == [100, 201, 2, 103, 204, 5, 6, 107, 8, 9, 210]


def gather_tables() -> list[list[float]]:
    return [table(size).gather_values()[:, 0].tolist() for size in (1, 11, 12)]


@pytest.mark.parametrize("workers", [None, "pool", "pool3"])
def test_gathered_values_are_in_the_order_of_the_rows(workers: str | None, request: pytest.FixtureRequest) -> None:
    answers = request.getfixturevalue(workers).run(gather_tables) if workers else [gather_tables()]
    for answer in answers:
        assert answer == [list(range(size)) for size in (1, 11, 12)]


def test_gathered_values_are_a_copy() -> None:
    t = table()
    t.gather_values().fill_(100.0)
    assert torch.equal(t.values, table().values)


def read_a_table_of_one_row() -> list[list[float]]:
    """Reads a table of one row: rank 1 has none."""
    t = table(1)
    t.write(torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
    t.commit()
    return t.read(torch.tensor([0, 0])).tolist()  # type: ignore[no-any-return]


def test_worker_without_rows_reads_rows_of_others(pool: Pool) -> None:
    assert pool.run(read_a_table_of_one_row) == [[[0, 0], [0, 0]]] * 2


def read_beyond() -> str:
    try:
        table().read(torch.tensor([1, 11 * rank()]))
    except IndexError as error:
        return str(error)
    return "no error"


@pytest.mark.fault(36, "a wrong id of one of two workers")
def test_wrong_row_of_one_worker_raises_on_all(pool: Pool) -> None:
    assert pool.run(read_beyond) == ["row 11 is outside of the table's rows 0..10"] * 2


def write_the_same_id() -> str:
    try:
        table().write(torch.tensor([5]), torch.zeros(1, 2))
    except ValueError as error:
        return str(error)
    return f"no error with {world_size()} workers"


@pytest.mark.fault(35, "one id on two workers")
def test_repeated_row_on_two_workers_raises(pool: Pool) -> None:
    assert all("[5]" in answer for answer in pool.run(write_the_same_id))
