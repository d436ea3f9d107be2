"""The arms of the measurement read the same photographs, each of them once an epoch."""

from pathlib import Path

import pytest

from bench import photographs
from tests.support.photograph_folders import write_photographs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return photographs.link_photographs([write_photographs(tmp_path / "photographs", 140)], tmp_path / "linked")


def test_all_photographs_are_found_in_one_class(root: Path) -> None:
    assert len(list((root / "photographs").iterdir())) == 140
    assert [folder.name for folder in root.iterdir()] == ["photographs"]


def test_arms_give_batches_of_one_size(root: Path, tmp_path: Path) -> None:
    recipe = photographs.make_photograph_recipe(root, tmp_path, 16)
    store = photographs.prepare_photographs(recipe, tmp_path / "stores")
    assert store.store_side == 32
    shape = (photographs.PHOTOGRAPH_BATCH, 1, 16, 16, 3)
    for resident in ("off", "on"):
        arm = photographs.PhotographArm(recipe, store, resident)
        first, second = ([tuple(batch["views"].shape) for batch in arm.read_photographs()] for _ in range(2))
        assert first == second == [shape] * 2
    theirs = [tuple(images.shape) for images, _ in photographs.TorchvisionArm(root, 16).read_photographs()]
    assert theirs == [(photographs.PHOTOGRAPH_BATCH, 3, 16, 16)] * 2


def test_every_arm_has_a_rate(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "PHOTOGRAPH_ROUNDS", 1)
    rates = photographs.compare_photograph_arms(root, tmp_path, 16)
    assert rates.keys() == {"torchvision", "streamed", "held"}
    assert min(rates.values()) > 0
    prepared, decoded = photographs.measure_preparing(root, tmp_path, 16)
    assert prepared > 0
    assert decoded > 0
