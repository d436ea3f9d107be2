"""The contract of all sources: parts, the added test split, the root."""

import dataclasses
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import SourcePart, open_source
from firstlight.pipeline.data.sources.source import describe_listing, open_local_root
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, open_folder_set, write_named_files


def test_parts_cover_every_image_once_and_in_order(tmp_path: Path) -> None:
    source = open_folder_set(
        write_named_files(tmp_path, *(f"train/{k:02d}.png" for k in range(7)), *(f"test/{k}.png" for k in range(4)))
    )
    assert source.split_into_parts(3) == [
        SourcePart("train", 0, 3),
        SourcePart("train", 3, 3),
        SourcePart("train", 6, 1),
        SourcePart("test", 0, 3),
        SourcePart("test", 3, 1),
    ]
    paths = [record.path for part in source.split_into_parts(3) for record in source.read(part)]
    assert paths == [f"train/{k:02d}.png" for k in range(7)] + [f"test/{k}.png" for k in range(4)]


@pytest.mark.fault(32, "a root that is none")
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_invalid_root_names_dataset_root(tmp_path: Path, source: str) -> None:
    for root, text in (
        (tmp_path / "missing", "does not exist"),
        (write_named_files(tmp_path, "file.txt") / "file.txt", "is a file"),
        (tmp_path, "no .*in"),
    ):
        with pytest.raises(UserError, match=rf"dataset\.root: .*{text}"):
            open_source(dataset_options(source=source, root=root))


def test_sources_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        open_folder_set(write_named_files(tmp_path, "a.jpg")).classes = ("x",)  # type: ignore[misc]


def test_local_source_refuses_bucket() -> None:
    with pytest.raises(
        UserError,
        match=r"^dataset\.root: 's3://b/x' is not on this machine; dataset\.source 'svhn' takes a folder on disk",
    ):
        open_local_root(dataset_options(source="svhn", root="s3://b/x"))


def test_listing_names_splits_classes_and_annotations() -> None:
    digits = open_source(dataset_options(source="digits", test_fraction=0.2))
    assert digits.reading[0] == "read 1,797 images: training 1,438, test 359"
    assert digits.reading[1].startswith("classes, 10 with their training images: 0 142, 1 146")
    annotated = dataclasses.replace(digits, annotations=("boxes", "present"), classes=("ant", "bee"))
    assert describe_listing(annotated)[1] == "annotations boxes, present, of 2 classes: ant, bee"
