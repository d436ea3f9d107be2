"""Lines about the outputs of a finished stage: their folders and the code that opens them."""

from collections.abc import Sequence

from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import StageOutput
from firstlight.pipeline.tracking.run_file import read_run_id


def list_outputs(stage: StageConfig, instance: StageInstance) -> list[StageOutput]:
    """Returns the outputs of a finished instance. The encoder of a pretraining is opened from MLflow if it is there."""
    found = stage_kind(stage).outputs(stage, instance)
    run_id = read_run_id(instance.folder)
    if not stage.makes_encoder or run_id is None:
        return found
    reference = f"runs:/{run_id}/encoder"
    return [
        StageOutput(output.name, output.path, f'fl.load_encoder("{reference}")') if output.name == "encoder" else output
        for output in found
    ]


def describe_outputs(stage: StageConfig, instances: Sequence[StageInstance]) -> list[str]:
    """Returns a line for each output of the first finished instance: where it is, and how it is opened."""
    finished = [instance for instance in instances if instance.result is not None]
    if not finished:
        return []
    more = f" (seed {finished[0].seed}; {len(finished) - 1} more)" if len(finished) > 1 else ""
    return [f"{output.name}{more}: {output.path}  {output.usage}" for output in list_outputs(stage, finished[0])]
