"""Runs instances of stages in a process: a worker of Ray Train, that of a command, or one beside it."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StopTraining, UserError
from firstlight.pipeline.run.mirroring import fetch_shared_work, find_fetched, upload_results
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures, watchdog
from firstlight.pipeline.train.attempts import record_attempt
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import append_row
from firstlight.tasks.collective import rank, world_size

# The field of a part of an instance with its name, see `StageKind.list_rounds`.
PART_KEY = "part"


@failures.fault_from_environment()
def run_instances(payload: dict[str, Any], on_ray: bool, device: torch.device) -> dict[str, Any]:
    """Runs the instances, or parts of them, on a worker. Returns the message and type of what ended them early,
    `{"stop": None}` if nothing did.

    The fields of a part are those of its instance and its name as `part`. All ranks raise the same StopTraining or
    UserError. It is returned, because Ray would repeat a training that raises.
    """
    recipe = parse_recipe(payload["recipe"])
    try:
        # This machine may have nothing yet of a storage in a bucket.
        context = StageContext.create(recipe, Store.open(find_fetched(payload["store"])), on_ray, device)
        for fields in payload["instances"]:
            keys = ("folder", "encoder", "begin", "given")
            paths = {key: find_fetched(fields[key]) if fields[key] else None for key in keys}
            companions = {name: find_fetched(folder) for name, folder in fields["companions"].items()}
            own = {key: value for key, value in fields.items() if key != PART_KEY}
            instance = StageInstance(**{**own, **paths, "companions": companions})
            stage = recipe.stages[instance.stage]
            if PART_KEY in fields:
                with failures.record_failures(instance.folder):
                    fetch_shared_work(instance.folder.parent)
                    stage_kind(stage).run_part(context, stage, instance, fields[PART_KEY])
                continue
            with (
                failures.record_failures(instance.folder),
                record_attempt(instance.folder, device),
                _watch_for_hang(instance.folder, recipe.scale, on_ray),
            ):
                fetch_shared_work(instance.folder.parent)
                stage_kind(stage).run(context, stage, instance)
            if rank() == 0:
                upload_results(instance.folder)
    except (StopTraining, UserError) as stop:
        kind = UserError if isinstance(stop, UserError) else type(stop)
        return {"stop": str(stop), "kind": kind.__name__}
    return {"stop": None}


def _watch_for_hang(folder: Path, scale: ScaleOptions, on_ray: bool) -> contextlib.AbstractContextManager[None]:
    """Watches a rank that is alone on Ray.

    Several ranks need no watchdog, because the timeout of their collectives ends a hang. In this process the user
    sees it.
    """
    if not on_ray or world_size() > 1:
        return contextlib.nullcontext()
    if watchdog.has_hung(folder):
        append_row(folder, {"note": f"it hung and was restarted; its stack is in {folder / watchdog.HANG_FILE}"})
    return watchdog.watch_process(folder, scale.collective_timeout_s)
