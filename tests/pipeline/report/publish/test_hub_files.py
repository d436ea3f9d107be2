"""Only the files of an export, as they were exported, become those of a hub's repository."""

from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.publish.hub_files import HubFile, find_stale_files, list_hub_files
from firstlight.pipeline.train.folder_manifest import write_manifest
from tests.support.exported_models import EXPORTED_FILES, write_export


def test_card_is_the_readme_and_files_of_timm_stand_at_the_top_as_well(tmp_path: Path) -> None:
    found = list_hub_files(write_export(tmp_path))
    assert found[0] == HubFile("README.md", tmp_path / "card.md", 31)
    assert {file.name: file.path.relative_to(tmp_path).as_posix() for file in found} == {
        "README.md": "card.md",
        "manifest.json": "manifest.json",
        **{name: name for name in EXPORTED_FILES},
        "config.json": "timm/config.json",
        "model.safetensors": "timm/model.safetensors",
    }


def test_folder_that_timm_does_not_load_by_name_has_nothing_at_the_top(tmp_path: Path) -> None:
    found = list_hub_files(write_export(tmp_path, {"timm/model.safetensors": b"weights"}))
    assert [file.name for file in found] == ["README.md", "timm/model.safetensors", "manifest.json"]


def test_other_files_of_the_folder_are_left_out(tmp_path: Path) -> None:
    before = list_hub_files(write_export(tmp_path))
    (tmp_path / "timm" / "secret.txt").write_text("x")
    (tmp_path / ".env").write_text("x")
    assert list_hub_files(tmp_path) == before


@pytest.mark.parametrize("name", ["timm/model.safetensors", "card.md", "manifest.json", "timm"])
def test_links_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_export(tmp_path / "export")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link, and only files of the folder itself are pushed") as caught:
        list_hub_files(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "timm/../../x", "onnx/.hidden", "other/file", "card.md"])
def test_manifest_names_no_other_files(tmp_path: Path, name: str) -> None:
    write_export(tmp_path)
    write_manifest(tmp_path, {name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(UserError, match="is no export: ") as caught:
        list_hub_files(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("changed", "is not the file that was exported: its size or sha256 differs"),
        ("longer", "bytes, more than the 5 that it should have"),
        ("missing", "is no export: it has no onnx/encoder.onnx"),
        ("no manifest", "is no export: it has no manifest.json; valid: the folder `export` of a stage export"),
        ("damaged manifest", "is no export: "),
        ("no card", "has no model card"),
        ("bare card", "is no model card: it has no front matter; run the recipe again"),
    ],
)
def test_folder_that_is_no_whole_export_is_a_one_line_error(tmp_path: Path, broken: str, message: str) -> None:
    write_export(tmp_path)
    file = tmp_path / "onnx" / "encoder.onnx"
    if broken == "changed":
        file.write_bytes(b"GRAPH")
    elif broken == "longer":
        file.write_bytes(b"graph and more")
    elif broken == "missing":
        file.unlink()
    elif broken == "no manifest":
        (tmp_path / "manifest.json").unlink()
    elif broken == "damaged manifest":
        (tmp_path / "manifest.json").write_text("{")
    elif broken == "no card":
        (tmp_path / "card.md").unlink()
    else:
        (tmp_path / "card.md").write_text("# Card")
    with pytest.raises(UserError) as caught:
        list_hub_files(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_an_earlier_push_are_stale_and_those_of_others_are_not() -> None:
    new = [HubFile(name, Path(), 0) for name in ("README.md", "manifest.json", "onnx/encoder.onnx")]
    there = ["README.md", "config.json", "model.safetensors", "timm/config.json", "onnx/encoder.onnx", "notes/a.md"]
    assert find_stale_files(there, new) == [], "no export was pushed there before"
    assert find_stale_files([*there, "manifest.json"], new) == ["config.json", "model.safetensors", "timm/config.json"]
