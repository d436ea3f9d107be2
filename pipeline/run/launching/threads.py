"""The torch threads of a stage in this process, with which `scale.threads: auto` gives all cores something to do.

They follow from the recipe and the machine alone, never from what is left to do or from the processes that share it:
results are equal to the last bit for equal numbers of threads only.
"""

import psutil

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import AUTO
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.usable_cpus import count_usable_cpus


def choose_threads(recipe: Recipe, name: str) -> int:
    """Returns the torch threads of each process that works on the stage `name`."""
    scale = recipe.scale
    if scale.threads != AUTO or scale.max_workers or scale.worker_gpus:
        return scale.worker_threads
    return max(count_cores(scale.cpus) // count_side_by_side(recipe, name), 1)


def fix_threads(recipe: Recipe, name: str) -> Recipe:
    """Returns the recipe with the torch threads of the stage `name` instead of `auto`."""
    scale = recipe.scale.model_copy(update={"threads": choose_threads(recipe, name)})
    return recipe.model_copy(update={"scale": scale})


def count_side_by_side(recipe: Recipe, name: str) -> int:
    """Returns how much of a stage can be done at a time: its seeds, each in the parts of its first round if it has any.

    The later rounds are short.
    """
    stage = recipe.stages[name]
    rounds = stage_kind(stage).list_rounds(stage)
    return len(recipe.seeds) * (len(rounds[0]) if rounds else 1)


def count_cores(cpus: int | None = None) -> int:
    """Returns the cores that this process may use, of `cpus` logical CPUs if given.

    Two threads on one core are hardly faster than one, so a core counts once.
    """
    usable = cpus or count_usable_cpus()
    return max(min(usable, psutil.cpu_count(logical=False) or usable), 1)
