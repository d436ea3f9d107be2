"""The statistics of mixing, on orders whose values are known."""

import numpy as np
import pytest

from bench import mixing
from firstlight.pipeline.data.manifest import ROWS_PER_GROUP
from firstlight.pipeline.data.order.id_set import make_id_set
from firstlight.pipeline.data.order.lane_plan import LanePlan
from firstlight.pipeline.data.plan import BatchPlan

IMAGES, BATCH = 4096, 256


@pytest.fixture(autouse=True)
def small_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "MIXING_IMAGES", IMAGES)


def make_small_plan(window: int, use_windows: bool) -> BatchPlan:
    return BatchPlan(np.arange(IMAGES), np.arange(0, IMAGES, ROWS_PER_GROUP), BATCH, 0, window, use_windows)


def test_stored_order_does_not_mix() -> None:
    order = np.arange(IMAGES).reshape(-1, BATCH)
    assert mixing._correlate_order(order) == pytest.approx(1)
    assert mixing._count_row_groups(order) == BATCH / ROWS_PER_GROUP
    assert mixing._count_neighbour_meetings(order) == pytest.approx(1 - (IMAGES // BATCH - 1) / (IMAGES - 1))
    assert mixing._count_repeated_pairs(order, order) == 1
    assert mixing._class_distance(order) > 0.8


def test_strided_order_has_uniform_classes_and_no_neighbours() -> None:
    order = np.arange(IMAGES).reshape(BATCH, -1).T
    assert mixing._class_distance(order) < 0.02
    assert mixing._count_neighbour_meetings(order) == 0
    assert mixing._count_repeated_pairs(np.arange(IMAGES).reshape(-1, BATCH), order) < 0.07


def test_unused_images_are_in_no_step() -> None:
    steps = mixing._find_steps(np.arange(2 * BATCH).reshape(2, BATCH))
    assert (steps[:BATCH] == 0).all()
    assert (steps[BATCH : 2 * BATCH] == 1).all()
    assert (steps[2 * BATCH :] == -1).all()


def test_permutation_mixes_more_and_reads_more_than_small_window() -> None:
    small, whole = (mixing.measure_mixing(make_small_plan(256, use_windows)) for use_windows in (True, False))
    assert whole.distance < small.distance
    assert whole.num_groups > small.num_groups
    assert whole.neighbours_meet < small.neighbours_meet
    assert whole.read_ratio > small.read_ratio


def test_lanes_mix_as_windows_do() -> None:
    windows = make_small_plan(1024, True)
    lanes = LanePlan(make_id_set(windows.ids), windows.group_starts, BATCH, 0, 1024)
    found, expected = mixing.measure_mixing(lanes), mixing.measure_mixing(windows)
    assert found.distance == pytest.approx(expected.distance, rel=0.3)
    assert found.num_groups == pytest.approx(expected.num_groups, rel=0.1)
    assert found.neighbours_meet == pytest.approx(expected.neighbours_meet, rel=0.15)
    assert found.read_ratio == pytest.approx(expected.read_ratio, rel=0.1)
