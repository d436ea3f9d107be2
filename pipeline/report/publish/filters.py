"""Figures of the first filters that the stages of a recipe have learned (Noise As Targets, figure 4)."""

from collections.abc import Iterable

from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.image_figures import draw_filters
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.stages.pictures import FILTERS_FILE, PRETRAINED_FILTERS, load_filters
from firstlight.pipeline.stages.stage import StageInstance

# The inputs of an encoder that end with a fixed filter.
FIXED_FILTER_INPUTS = ("sobel", "high_pass", "rgb_sobel")


def add_filters(figure_log: FigureLog, recipe: Recipe, instance: StageInstance) -> None:
    """Adds the filters of the networks that an instance has trained, if they start with a convolution."""
    networks = load_filters(instance.folder / FILTERS_FILE)
    if networks:
        labelled = len(networks) > 1
        _add_filter_figure(
            figure_log, recipe, {name if labelled else "": found for name, found in networks.items()}, ""
        )


def add_filter_comparison(figure_log: FigureLog, recipe: Recipe, instances: Iterable[StageInstance]) -> None:
    """Adds the filters of all stages in one figure, those of the first seed, if more than one stage has any."""
    networks: dict[str, list[Tensor]] = {}
    stages = set[str]()
    for instance in instances:
        if instance.seed != recipe.seeds[0]:
            continue
        for name, found in load_filters(instance.folder / FILTERS_FILE).items():
            stages.add(instance.stage)
            networks[instance.stage if name == PRETRAINED_FILTERS else f"{instance.stage}, {name}"] = found
    if len(stages) > 1:
        _add_filter_figure(figure_log, recipe, networks, " of all stages")


def _add_filter_figure(figure_log: FigureLog, recipe: Recipe, networks: dict[str, list[Tensor]], whose: str) -> None:
    composed = recipe.network_spec.get("input") in FIXED_FILTER_INPUTS
    effect = ", combined with the fixed filter before them: as they act on the image" if composed else ""
    figure = draw_filters({name: [tower.numpy() for tower in found] for name, found in networks.items()}, composed)
    figure_log.add("filters", figure, f"filters of the first convolution{whose}{effect}")
