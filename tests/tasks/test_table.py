import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.collective import gather, rank, world
from tasks.table import SampleTable
from tests.gloo import Pool


def table(size: int = 11) -> SampleTable:
    return SampleTable(size, (2,), torch.float32, lambda ids: torch.stack((ids, -ids), 1))


def shard_of(size: int, rank_: int, world_: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(size)[rank_::world_]
    return {"ids": ids, "rows": torch.stack((ids + 0.5, -ids + 0.25), 1)}


def test_a_write_waits_for_commit() -> None:
    t = table()
    t.write(torch.tensor([4, 2]), torch.tensor([[9.0, 9.0], [8.0, 8.0]]))
    assert t.read(torch.tensor([2, 4])).tolist() == [[2, -2], [4, -4]]
    t.commit()
    assert t.read(torch.tensor([2, 4])).tolist() == [[8, 8], [9, 9]]
    assert t.read(torch.tensor([0, 10])).tolist() == [[0, 0], [10, -10]]


@pytest.mark.parametrize("bad", [-1, 11])
def test_an_id_outside_is_named(bad: int) -> None:
    with pytest.raises(IndexError, match=str(bad)):
        table().read(torch.tensor([1, bad]))


@given(st.integers(1, 30), st.integers(1, 5), st.randoms())
def test_shards_of_any_number_of_workers_are_taken(size: int, writers: int, random: object) -> None:
    shards = [shard_of(size, r, writers) for r in range(writers)]
    random.shuffle(shards)  # type: ignore[attr-defined]
    t = table(size)
    t.load_state_dicts(shards)
    assert torch.equal(t.rows[:, 0], torch.arange(size) + 0.5)


@given(st.integers(2, 30), st.integers(2, 5))
def test_a_missing_shard_is_an_error(size: int, writers: int) -> None:
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
    return before, gather(t.read(ids)), t.state_dict()


def test_two_workers(pool: Pool) -> None:
    answers = pool.run(on_two_workers)
    assert answers[0][0][:, 0].tolist() == [0, 3, 7]
    assert answers[1][0][:, 0].tolist() == [10, 1, 4]
    for _, after, _ in answers:
        assert after[:, 0].tolist() == [100, 103, 107, 210, 201, 204]
    one = table()
    one.load_state_dicts([a[2] for a in answers])
    assert one.rows[:, 0].tolist() == [100, 201, 2, 103, 204, 5, 6, 107, 8, 9, 210]


def write_the_same_id() -> str:
    try:
        table().write(torch.tensor([5]), torch.zeros(1, 2))
    except ValueError as error:
        return str(error)
    return f"no error with {world()} workers"


def test_one_id_on_two_workers_is_an_error(pool: Pool) -> None:
    assert all("[5]" in answer for answer in pool.run(write_the_same_id))
