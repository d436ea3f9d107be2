"""The file of a first recipe, with a comment for each section."""

import re
from pathlib import Path
from typing import Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.starter.choices import ChosenSettings
from firstlight.pipeline.starter.survey import ImageSurvey


def write_recipe(file: Path, survey: ImageSurvey, chosen: ChosenSettings) -> None:
    """Writes the recipe, which `firstlight run` takes.

    Raises:
        UserError: the file exists already.
    """
    if file.exists():
        raise UserError(f"{file}: exists already; valid: another --out, or delete it")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, format_recipe(name_recipe(file), survey, chosen).encode())


def name_recipe(file: Path) -> str:
    """Returns the name of the recipe in a file: that of the file, with `-` for what a name must not have."""
    return re.sub(r"[^A-Za-z0-9]+", "-", file.stem).strip("-")[:64] or "recipe"


def format_recipe(name: str, survey: ImageSurvey, chosen: ChosenSettings) -> str:
    """Returns the text of the recipe."""
    sections = [
        "# `firstlight run` takes this file. docs/reference.md has all keys; the command line sets any of them, as in "
        f"stages.pretrain.epochs=20.\n{_dump({'name': name})}",
        f"# Each seed is a training of its own.\n{_dump({'seeds': list(chosen.seeds)})}",
        f"# {chosen.reasons[0]}\n{_dump({'dataset': {**survey.dataset, 'image_size': chosen.image_size}})}",
        f"# {chosen.reasons[2]}. mean and std null: those of these images.\n{_dump({'encoder': chosen.encoder})}",
        "# This machine; `name: cluster` is a running Ray cluster.\n" + _dump({"scale": {"name": "local"}}),
        "# Stages run in this order.\nstages:\n" + _indent(_format_stages(chosen)),
    ]
    return "\n".join(sections)


def _format_stages(chosen: ChosenSettings) -> str:
    pretrain: dict[str, Any] = {**chosen.pretrain, "watch": {"every": max(chosen.pretrain["epochs"] // 5, 1)}}
    if "weights" in chosen.encoder and chosen.finetune is not None:
        # The weights as given are one of the candidates, by kNN, which needs labels.
        pretrain |= {"keep": "best", "early_stopping": 2, "watch": {"every": 1, "knn_k": 10}}
    parts = [f"# {chosen.reasons[3]}; {chosen.reasons[4]}\n{_dump({'pretrain': pretrain})}"]
    if chosen.finetune is None:
        return "\n".join([*parts, f"# Embeddings of all images as Parquet, and a map of them.\n{_dump({'embed': {}})}"])
    finetune = {
        "task": {"name": "classify"},
        **chosen.finetune,
        "epochs": 25,
        "optimizer": {"name": "SGD", "lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 5.0e-4},
        "schedule": {"name": "CosineAnnealingLR"},
        "channels_last": True,
    }
    parts += [
        f"# kNN and a linear probe on frozen features, beside random weights.\n{_dump({'evaluate': {}})}",
        "# Fine-tuning with few labels, beside the same network from scratch; both try a third and three times lr.\n"
        + _dump({"finetune": finetune}),
    ]
    return "\n".join(parts)


def _dump(section: dict[str, Any]) -> str:
    return yaml_reader.dump_yaml(section)


def _indent(text: str) -> str:
    return "".join(f"  {line}" if line.strip() else line for line in text.splitlines(keepends=True))
