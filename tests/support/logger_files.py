"""The content of the files of TensorBoard and Weights & Biases, as their packages read them."""

import json
from pathlib import Path
from typing import Any

from firstlight.pipeline.tracking.loggers.wandb_files import STEP_KEY, iterate_wandb_records, read_history


def read_tensorboard(storage: Path, only: Path | None = None) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Returns scalars (step, value) and PNG files by tag, of all runs or of the folder `only`, and the folders."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, Any] = {}
    images: dict[str, Any] = {}
    folders = [only] if only else sorted({file.parent for file in (storage / "tensorboard").rglob("events.*")})
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["images"]:
            (image,) = events.Images(tag)
            images[tag] = image.encoded_image_string
    return {"scalars": scalars, "images": images}, folders


def read_wandb(storage: Path, run_id: str) -> dict[str, Any]:
    """Returns what all folders of a run hold: numbers (step, value) and images by key, the configuration, W&B's own
    count of each row, and the exit code."""
    found: dict[str, Any] = {"numbers": {}, "images": {}, "config": {}, "rows": [], "exit": None}
    for file in sorted((storage / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")):
        for record in iterate_wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found["config"] |= {
                    item.key: json.loads(item.value_json) for item in record.run.config.update if item.key != "_wandb"
                }
            elif kind == "exit":
                found["exit"] = record.exit.exit_code
            elif kind == "history":
                _add_history(found, record)
    return found


def _add_history(found: dict[str, Any], record: Any) -> None:
    row = read_history(record)
    found["rows"].append(row.pop("_step"))
    step = row.pop(STEP_KEY)
    for key, value in row.items():
        if isinstance(value, dict):
            found["images"][key] = value["sha256"]
        elif not key.startswith("_"):
            found["numbers"].setdefault(key, []).append((step, float(value)))
