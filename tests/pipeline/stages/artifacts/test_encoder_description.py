"""The description of an encoder is read from a whole folder, and compared with the spec of a recipe."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts.encoder_description import check_encoder_spec, read_encoder_spec
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.train.folder_manifest import write_file, write_manifest
from tests.support.saved_encoders import SMALL_SPEC, rewrite_encoder


def test_missing_encoder_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path / 'none'}: is not a whole encoder: .*manifest.json"):
        read_encoder_spec(tmp_path / "none")


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"format": 1}', b'{"spec": 3}', b"{", b"\xff"])
def test_folder_of_another_artifact_is_refused(tmp_path: Path, content: bytes) -> None:
    write_manifest(tmp_path, write_file(tmp_path, "encoder.json", content))
    with pytest.raises(UserError, match=rf"{tmp_path}: is not a whole encoder"):
        read_encoder_spec(tmp_path)


@pytest.mark.fault(54, "a manifest that leads out of its folder")
def test_a_manifest_must_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_manifest(
        tmp_path / "in", {f"../{name}": entry for name, entry in write_file(tmp_path, "encoder.json", b"{}").items()}
    )
    with pytest.raises(UserError, match=r"it names '\.\./encoder\.json', which is no file of its folder"):
        read_encoder_spec(tmp_path / "in")


def test_the_same_spec_passes_as_tuples_and_as_lists(folder: Path) -> None:
    check_encoder_spec(folder, SMALL_SPEC, "stages.evaluate.encoder")
    check_encoder_spec(folder, {**SMALL_SPEC, "mean": [0.1, 0.2, 0.3]}, "stages.evaluate.encoder")
    with pytest.raises(UserError, match=r"^encoder\.mean: "):
        check_encoder_spec(folder, {**SMALL_SPEC, "mean": [0.1, 0.2, 0.31]}, "stages.evaluate.encoder")


@pytest.mark.fault(47, "an encoder of another shape, input or statistics")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 8}, "encoder.width: 8 differs from 4 of"),
        ({"width": 8, "depth": 3}, "encoder.depth: 3 differs from 2 of"),
        ({"mean": (0.1, 0.2, 0.4)}, "encoder.mean: [0.1, 0.2, 0.4] differs from [0.1, 0.2, 0.3] of"),
        ({"stem": "cifar"}, "encoder.stem: 'cifar' differs from None of"),
        ({"name": "alexnet", "depth": 3}, "encoder.name: 'alexnet' differs from 'convnet' of"),
    ],
)
def test_the_first_key_that_differs_is_named_with_both_values(folder: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        check_encoder_spec(folder, {**SMALL_SPEC, **changes}, "stages.evaluate.encoder")
    assert str(error.value) == f"{told} the encoder that stages.evaluate.encoder names ({folder})"


def test_key_that_only_the_saved_encoder_has_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.input: None differs from 'sobel'"):
        check_encoder_spec(folder, {k: v for k, v in SMALL_SPEC.items() if k != "input"}, "x")


@pytest.mark.parametrize(
    "description", [{"image_size": 10**9}, {"image_size": 0}, {"image_size": "8"}, {"spec": []}, {"shapes": 3}]
)
def test_description_of_another_shape_is_named(folder: Path, description: dict[str, Any]) -> None:
    rewrite_encoder(folder, **description)
    (key,) = description
    with pytest.raises(UserError, match=rf"^{folder}: is not a whole encoder: encoder\.json: is damaged: {key}"):
        load_encoder(folder, 8)
