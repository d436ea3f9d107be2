"""Recipes know the kinds of stages that are registered."""

import firstlight.pipeline.stages.registry  # noqa: F401
