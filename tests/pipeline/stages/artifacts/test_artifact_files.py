"""The two files of an artifact."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from firstlight.pipeline.stages.artifacts.artifact_files import write_artifact_files
from firstlight.pipeline.train.folder_manifest import read_verified, write_manifest


def test_files_are_read_back_under_a_manifest_of_their_entries(tmp_path: Path) -> None:
    turned = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    entries = write_artifact_files(tmp_path / "new", "table", {"a": turned}, {"format": 1, "facts": [1, "x"]})
    write_manifest(tmp_path / "new", entries)
    _, files = read_verified(tmp_path / "new")
    assert set(files) == {"table.safetensors", "table.json"}
    assert json.loads(files["table.json"]) == {"format": 1, "facts": [1, "x"]}
    assert torch.equal(load_file(tmp_path / "new" / "table.safetensors")["a"], turned.detach())
