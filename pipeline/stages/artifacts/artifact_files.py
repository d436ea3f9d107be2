"""The two files of an artifact: its weights as safetensors, and a description as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.train.folder_manifest import write_file


def write_artifact_files(
    folder: Path, name: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Writes `<name>.safetensors` and `<name>.json` into a folder that gets a manifest later. Returns their entries of
    it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    files = write_file(folder, f"{name}.safetensors", save_tensors(weights))
    return files | write_file(folder, f"{name}.json", json.dumps(description, indent=1).encode())
