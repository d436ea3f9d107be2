"""The kinds of stages by name. Importing this module makes their sections known to recipes."""

from typing import Any

from firstlight.pipeline.config.stages import StageConfig, register_section
from firstlight.pipeline.stages.embed import EmbedStage
from firstlight.pipeline.stages.evaluate import EvaluateStage
from firstlight.pipeline.stages.export import ExportStage
from firstlight.pipeline.stages.finetune import FinetuneStage
from firstlight.pipeline.stages.pretrain import PretrainStage
from firstlight.pipeline.stages.reconstruct import ReconstructStage
from firstlight.pipeline.stages.retrieve import RetrieveStage
from firstlight.pipeline.stages.stage_kind import StageKind

STAGES: dict[str, StageKind[Any]] = {}


def register_stage(kind: StageKind[Any]) -> None:
    """Adds a kind of stage, under the name that the field `kind` of its section allows."""
    STAGES[register_section(kind.section)] = kind


def stage_kind(stage: StageConfig) -> StageKind[Any]:
    """Returns the kind of a stage of a recipe."""
    return STAGES[stage.kind]


register_stage(PretrainStage())
register_stage(EvaluateStage())
register_stage(FinetuneStage())
register_stage(RetrieveStage())
register_stage(ReconstructStage())
register_stage(EmbedStage())
register_stage(ExportStage())
