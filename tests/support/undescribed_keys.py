"""The keys of recipes and searches that nobody has described."""

from pydantic import BaseModel

from firstlight.pipeline.cli.reference import RECIPE_SECTIONS, SEARCH_SECTIONS, SHARED_STAGE_SECTIONS
from firstlight.pipeline.config.optim import OptimizerSpec, ScheduleSpec
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.reference import union_members
from firstlight.pipeline.config.schema import AugmentOp, EncoderSpec, MethodSpec, TaskSpec
from firstlight.pipeline.search.space import Search
from firstlight.pipeline.stages.registry import STAGES


def list_missing_meanings(model: type[BaseModel]) -> list[str]:
    """Returns the fields of a model that have no description."""
    return [name for name, field in model.model_fields.items() if not field.description]


def list_undescribed_keys() -> list[str]:
    """Returns the keys of all models that have no meaning, as <model>.<key>."""
    models: list[type[BaseModel]] = [Recipe, OptimizerSpec, ScheduleSpec, Search]
    models += [
        *RECIPE_SECTIONS.values(),
        *SHARED_STAGE_SECTIONS.values(),
        *(stage.section for stage in STAGES.values()),
    ]
    models += [model for sections in SEARCH_SECTIONS.values() for model in sections]
    models += [model for union in (MethodSpec, TaskSpec, EncoderSpec, AugmentOp) for model in union_members(union)]
    return [f"{model.__name__}.{key}" for model in models for key in list_missing_meanings(model)]
