"""The file of a first recipe, with a comment for each section."""

import re
from pathlib import Path
from typing import Any

# Its import makes the kinds of stages known.
import firstlight.pipeline.stages.sections.known  # noqa: F401
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.scale import AUTO
from firstlight.pipeline.config.stages import STAGE_SECTIONS
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


def format_recipe(name: str, survey: ImageSurvey, chosen: ChosenSettings, storage: str | None = None) -> str:
    """Returns the text of the recipe. `storage`: the folder of its results, by default `runs`."""
    place = "" if storage is None else f"# Stores, checkpoints, results and reports.\n{_dump({'storage': storage})}"
    sections = [
        "# `firstlight run` takes this file. docs/reference.md has all keys; the command line sets any of them, as in "
        f"stages.pretrain.epochs=20.\n{_dump({'name': name})}",
        *([place] if place else []),
        f"# Each seed is a training of its own.\n{_dump({'seeds': list(chosen.seeds)})}",
        f"# {chosen.reasons[0]}\n{_dump({'dataset': {**survey.dataset, 'image_size': chosen.image_size}})}",
        f"# {chosen.reasons[2]}\n# mean and std null: those of these images.\n{_dump({'encoder': chosen.encoder})}",
        "# This machine, in one process where `workers` is 0; `name: cluster` is a running Ray cluster.\n"
        + _dump({"scale": chosen.scale}),
        "# Stages run in this order.\nstages:\n" + _indent(_format_stages(chosen)),
    ]
    return "\n".join(sections)


def _format_stages(chosen: ChosenSettings) -> str:
    parts = []
    if chosen.pretrain is not None:
        pretrain: dict[str, Any] = {**chosen.pretrain, "watch": {"every": max(chosen.pretrain["epochs"] // 5, 1)}}
        if "weights" in chosen.encoder and chosen.finetune is not None:
            # The weights as given are one of the candidates, by kNN, which needs labels.
            pretrain |= {"keep": "best", "early_stopping": 2, "watch": {"every": 1, "knn_k": chosen.knn_k}}
        parts.append(f"# {chosen.reasons[3]}; {chosen.reasons[4]}\n{_dump({'pretrain': pretrain})}")
    start: dict[str, Any] = {} if chosen.pretrain else {"encoder": "given"}
    for goal in chosen.goals:
        section = start | (_list_finetune_keys(chosen) if goal == "finetune" else {})
        section |= {"knn_k": chosen.knn_k} if goal == "evaluate" else {}
        section |= {"precision": AUTO} if "precision" in STAGE_SECTIONS[goal].model_fields else {}
        parts.append(f"# {STAGE_SECTIONS[goal].recipe_comment}\n{_dump({goal: section})}")
    return "\n".join(parts)


def _list_finetune_keys(chosen: ChosenSettings) -> dict[str, Any]:
    assert chosen.finetune is not None
    return {
        "task": {"name": "classify"},
        **chosen.finetune,
        "epochs": 25,
        "optimizer": {"name": "SGD", "lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 5.0e-4},
        "schedule": {"name": "CosineAnnealingLR"},
        "channels_last": True,
    }


def _dump(section: dict[str, Any]) -> str:
    return yaml_reader.dump_yaml(section)


def _indent(text: str) -> str:
    return "".join(f"  {line}" if line.strip() else line for line in text.splitlines(keepends=True))
