import math
from functools import partial

import pytest
import torch
from torch import Tensor

from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.pseudo_labels import (
    LABELLED,
    UNSELECTED,
    FixedThreshold,
    FlexibleThreshold,
    FreeThreshold,
    consistency_loss,
    fairness_loss,
    measure_pseudo_labels,
)
from tests.support import references_semi as references
from tests.support.gloo import Pool

CLASSES, SIZE = 4, 30


def draw_logits(count: int = 12, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)


def some_unlabelled(count: int = 12) -> Tensor:
    return torch.arange(count) % 3 != 0


def labels_of(unlabelled: Tensor) -> list[int]:
    return [-1 if one else 0 for one in unlabelled.tolist()]


@pytest.mark.parametrize("count", [1, 5, 12])
def test_consistency_is_equation_4_of_fixmatch(count: int) -> None:
    weak, strong, unlabelled = draw_logits(count), draw_logits(count, 1), some_unlabelled(count)
    taken = FixedThreshold(0.7)(weak.softmax(1), unlabelled, torch.arange(count))
    found = consistency_loss(strong, weak.argmax(1), taken, unlabelled)
    _, expected, share = references.fixmatch_losses(
        weak.softmax(1), strong.softmax(1), labels_of(unlabelled), [0.7] * CLASSES
    )
    assert float(found) == pytest.approx(expected, rel=1e-12)
    told = measure_pseudo_labels(weak.argmax(1), taken, unlabelled, None, CLASSES)
    assert float(told["mask"]) == pytest.approx(share, rel=1e-6)
    if count == 12:
        assert 0.0 < share < 1.0, "both kinds are there"


def test_threshold_is_reached_by_equal_confidence_and_never_by_labelled_images() -> None:
    even = torch.full((3, 2), 0.5, dtype=torch.float64)
    unlabelled = torch.tensor([True, False, True])
    assert FixedThreshold(0.5)(even, unlabelled, torch.arange(3)).tolist() == [True, False, True]
    assert not FixedThreshold(0.51)(even, unlabelled, torch.arange(3)).any()


def test_gradcheck() -> None:
    strong, taken = draw_logits(6, 2, 1.0).requires_grad_(), torch.tensor([True, False, True, True, True, False])
    expected, histogram = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    unlabelled, targets = torch.ones(6, dtype=torch.bool), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda x: consistency_loss(x, targets, taken, unlabelled), (strong,))
    assert torch.autograd.gradcheck(lambda x: fairness_loss(x, taken, expected.double(), histogram.double()), (strong,))


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("mapping", ["convex", "linear", "concave"])
def test_flexible_thresholds_are_those_of_flexmatch_over_steps(warmup: bool, mapping: str) -> None:
    """The state of an image changes with confident predictions alone, and a step reads it as it was before."""
    threshold = FlexibleThreshold(0.8, CLASSES, SIZE, warmup, mapping)  # type: ignore[arg-type]
    states = dict.fromkeys(range(SIZE), -1)
    seen = set()
    for step in range(8):
        rows = torch.randperm(SIZE, generator=torch.Generator().manual_seed(step))[:12]
        weak, unlabelled = draw_logits(12, step).softmax(1), rows % 5 != 0
        counted = [state for state in states.values() if state is not None]
        expected = references.flexmatch_thresholds(counted, CLASSES, 0.8, warmup, mapping)  # type: ignore[arg-type]
        taken = threshold(weak, unlabelled, rows)
        assert threshold.class_thresholds is not None
        assert threshold.class_thresholds.tolist() == pytest.approx(expected, rel=1e-12)
        assert taken.tolist() == [
            bool(free) and max(q) >= expected[q.index(max(q))]
            for q, free in zip(weak.tolist(), unlabelled.tolist(), strict=True)
        ]
        threshold.selected.commit()
        for row, q, free in zip(rows.tolist(), weak.tolist(), unlabelled.tolist(), strict=True):
            if not free:
                states[row] = None  # type: ignore[assignment]
            elif max(q) >= 0.8:
                states[row] = q.index(max(q))
        seen |= {round(value, 6) for value in expected}
        table = threshold.selected.values.tolist()
        assert table == [LABELLED if state is None else state for _, state in sorted(states.items())]
    assert len(seen) > 5, "the thresholds move"
    assert UNSELECTED in threshold.selected.values.tolist()


def test_warmup_keeps_thresholds_low_while_few_images_are_selected() -> None:
    found = []
    for warmup in (True, False):
        threshold = FlexibleThreshold(0.95, CLASSES, 100, warmup, "linear")
        threshold.selected.values[:10] = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
        found.append([round(value, 4) for value in threshold.measure_learning().tolist()])
    assert found == [[round(k / 90, 4) for k in (6, 3, 1, 0)], [1.0, 0.5, 0.1667, 0.0]]


def test_free_thresholds_are_those_of_freematch_over_steps() -> None:
    threshold = FreeThreshold(0.9, CLASSES).double()
    level, expected, histogram = 1 / CLASSES, [1 / CLASSES] * CLASSES, [1 / CLASSES] * CLASSES
    num_taken = 0
    for step in range(6):
        weak, unlabelled = draw_logits(12, step, 1.0).softmax(1), some_unlabelled()
        taken = threshold(weak, unlabelled, torch.arange(12))
        level, expected, histogram = references.freematch_averages(
            weak, labels_of(unlabelled), 0.9, level, expected, histogram
        )
        thresholds = references.freematch_thresholds(level, expected)
        assert float(threshold.level) == pytest.approx(level, rel=1e-6)
        assert threshold.expected.tolist() == pytest.approx(expected, rel=1e-6)
        assert threshold.histogram.tolist() == pytest.approx(histogram, rel=1e-6)
        assert taken.tolist() == [
            bool(free) and max(q) >= thresholds[q.index(max(q))]
            for q, free in zip(weak.tolist(), unlabelled.tolist(), strict=True)
        ]
        num_taken += int(taken.sum())
        strong = draw_logits(12, 100 + step)
        assert float(fairness_loss(strong, taken, threshold.expected, threshold.histogram)) == pytest.approx(
            references.freematch_fairness(strong.softmax(1), taken.tolist(), expected, histogram), rel=1e-6
        )
    assert 0 < num_taken < 48, "both kinds are there"


def test_batch_without_unlabelled_images_changes_no_average() -> None:
    threshold = FreeThreshold(0.9, CLASSES)
    before = {name: value.clone() for name, value in threshold.named_buffers()}
    assert not threshold(draw_logits(5).float().softmax(1), torch.zeros(5, dtype=torch.bool), torch.arange(5)).any()
    assert all(torch.equal(value, before[name]) for name, value in threshold.named_buffers())


def test_losses_without_taken_labels_are_0_with_gradient_0() -> None:
    strong, nothing = draw_logits(5).float().requires_grad_(), torch.zeros(5, dtype=torch.bool)
    even = torch.full((CLASSES,), 0.25)
    loss = consistency_loss(strong, strong.argmax(1), nothing, ~nothing) + fairness_loss(strong, nothing, even, even)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert strong.grad is not None
    assert torch.equal(strong.grad, torch.zeros_like(strong))


def test_fairness_of_equal_shares_is_minus_the_entropy_of_equal_shares() -> None:
    taken, even = torch.ones(CLASSES, dtype=torch.bool), torch.full((CLASSES,), 0.25, dtype=torch.float64)
    fair = fairness_loss(8.0 * torch.eye(CLASSES, dtype=torch.float64), taken, even, even)
    assert float(fair) == pytest.approx(-math.log(CLASSES), rel=1e-10)


def test_measures_look_at_taken_labels_alone() -> None:
    targets, truth = torch.tensor([0, 1, 2, 2, 3]), torch.tensor([0, 2, 2, -1, 3])
    taken, unlabelled = torch.tensor([True, True, True, True, False]), torch.tensor([True, True, True, True, False])
    told = measure_pseudo_labels(targets, taken, unlabelled, truth, CLASSES)
    assert {name: float(value) for name, value in told.items()} == pytest.approx(
        {"mask": 1.0, "classes_used": 3.0, "pseudo_accuracy": 2 / 3}
    )


def judge_on_this_rank(kind: str) -> dict[str, Tensor]:
    """Three steps of a threshold on this worker's part of 12 predictions. Returns the state after them."""
    threshold: FlexibleThreshold | FreeThreshold = (
        FlexibleThreshold(0.8, CLASSES, SIZE, True, "convex")
        if kind == "flexible"
        else FreeThreshold(0.9, CLASSES).double()
    )
    size = 12 // world_size()
    part = slice(rank() * size, (rank() + 1) * size)
    taken = torch.zeros(0)
    for step in range(3):
        rows = torch.randperm(SIZE, generator=torch.Generator().manual_seed(step))[:12]
        # The first worker of three has labelled images only.
        unlabelled = torch.arange(12) >= 4
        taken = threshold(draw_logits(12, step).softmax(1)[part], unlabelled[part], rows[part])
        for table in threshold.tables.values():
            table.commit()
    tables = {name: table.read(torch.arange(SIZE)) for name, table in threshold.tables.items()}
    assert threshold.class_thresholds is not None
    return {**tables, **dict(threshold.named_buffers()), "thresholds": threshold.class_thresholds, "taken": taken}


@pytest.mark.parametrize("kind", ["flexible", "free"])
@pytest.mark.parametrize("workers", ["pool", "pool3"])
def test_thresholds_on_workers_are_those_on_one(request: pytest.FixtureRequest, workers: str, kind: str) -> None:
    pool: Pool = request.getfixturevalue(workers)
    one, answers = judge_on_this_rank(kind), pool.run(partial(judge_on_this_rank, kind))
    assert torch.equal(torch.cat([answer.pop("taken") for answer in answers]), one.pop("taken"))
    for answer in answers:
        torch.testing.assert_close(answer, one, rtol=1e-12, atol=0)
