"""What all sources share: parts, the split that is carved out, the root."""

import dataclasses
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import Part, open_source
from firstlight.pipeline.errors import UserError
from tests.support.tiny import dataset, files, folder, summary


def test_parts_cover_every_image_once_and_in_order(tmp_path: Path) -> None:
    source = folder(files(tmp_path, *(f"train/{k:02d}.png" for k in range(7)), *(f"test/{k}.png" for k in range(4))))
    assert source.parts(3) == [
        Part("train", 0, 3),
        Part("train", 3, 3),
        Part("train", 6, 1),
        Part("test", 0, 3),
        Part("test", 3, 1),
    ]
    paths = [record.path for part in source.parts(3) for record in source.read(part)]
    assert paths == [f"train/{k:02d}.png" for k in range(7)] + [f"test/{k}.png" for k in range(4)]


@pytest.mark.fault(32, "a root that is none")
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_roots_that_are_none(tmp_path: Path, source: str) -> None:
    for root, text in (
        (tmp_path / "missing", "does not exist"),
        (files(tmp_path, "file.txt") / "file.txt", "is a file"),
        (tmp_path, "no .*in"),
    ):
        with pytest.raises(UserError, match=rf"dataset\.root: .*{text}"):
            open_source(dataset(source=source, root=root))


def test_the_carved_split_is_stratified_and_steady(tmp_path: Path) -> None:
    names = [f"cat/{k}.png" for k in range(40)] + [f"dog/{k}.png" for k in range(10)] + ["emu/0.png"]
    source = folder(files(tmp_path, *names), test_fraction=0.2)
    train, test = summary(source), summary(source, "test")
    assert [label for _, label in test] == [0] * 8 + [1] * 2  # the only emu stays in training
    assert sorted(train + test) == sorted((name, {"c": 0, "d": 1, "e": 2}[name[0]]) for name in names)
    assert [path for path, _ in train] == sorted(path for path, _ in train)
    assert summary(folder(tmp_path, test_fraction=0.2), "test") == test
    assert summary(folder(tmp_path, test_fraction=0.2, split_seed=1), "test") != test
    more = summary(folder(files(tmp_path, *(f"cat/new{k}.png" for k in range(5))), test_fraction=0.2), "test")
    assert len(set(test) & set(more)) >= 8  # of 10: one more cat, and the newcomers that are drawn


def test_no_fraction_no_test_split(tmp_path: Path) -> None:
    assert folder(files(tmp_path, "a/1.png", "a/2.png"), test_fraction=0.0).splits == {"train": 2}
    assert folder(tmp_path, test_fraction=0.9).splits == {"train": 1, "test": 1}


def test_sources_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        folder(files(tmp_path, "a.jpg")).classes = ("x",)  # type: ignore[misc]
