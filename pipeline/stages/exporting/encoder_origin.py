"""The facts of a saved encoder that say how it was made."""

from pathlib import Path
from typing import Any

from firstlight.pipeline.stages.artifacts.encoder_description import read_encoder_description

# The facts, and their types.
ORIGIN_FACTS: dict[str, type] = {"method": dict, "task": dict, "arm": str, "store": str, "seed": int}


def read_encoder_origin(folder: Path) -> dict[str, Any]:
    """Returns how a saved encoder was made: its method, or the task and the start of a fine-tuning; store and seed."""
    description = read_encoder_description(folder)
    return {key: description[key] for key, kind in ORIGIN_FACTS.items() if isinstance(description.get(key), kind)}
