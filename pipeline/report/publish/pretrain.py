"""Publisher of pretrainings."""

from collections.abc import Sequence

import numpy as np
import torch

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.labelled import write_labelled
from firstlight.pipeline.report import curves, figures, image_figures
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.report.publish.filters import add_filters
from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.stages.features.projection import name_principal_axes
from firstlight.pipeline.stages.pictures import NUM_VIEWED_IMAGES, PICTURES_FILE, load_pictures, read_tensors
from firstlight.pipeline.stages.pretraining.job import build_view_loader, count_steps_per_epoch, pretrain_label_ids
from firstlight.pipeline.stages.pretraining.measuring import PRETRAIN_MAP_FILE
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import DROPPED_IDS_FILE, METRICS_FILE, read_metrics
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.pretrain import metric_plots
from firstlight.tasks.visuals import ImageGrid, ImageRow, describe_shown


class PretrainPublisher(StagePublisher[Pretrain]):
    """Publishes the networks, scores and figures of a training, and the images that it took labels of or dropped."""

    def publish(
        self, tracking: TrackingClient, run_id: str, context: StageContext, stage: Pretrain, instance: StageInstance
    ) -> None:
        result, client = instance.result, tracking.client
        assert result is not None
        # One encoder of a stage is registered: that of the first seed.
        name = stage.register_as if instance.seed == context.recipe.seeds[0] else None
        tracking.log_encoder(run_id, instance.folder / "encoder", instance, name)
        tracking.log_results(run_id, result["accuracy"], "own_classifier/")
        tracking.log_results(run_id, result["held_out"], "held_out/")
        for network in result["handed_on"]:
            client.log_artifacts(run_id, str(instance.folder / network), network)
        if stage.labelled_per_batch:
            ids = pretrain_label_ids(context, stage, instance.seed)
            client.log_artifact(run_id, str(write_labelled(context.store, ids, instance.folder)))
        if (instance.folder / DROPPED_IDS_FILE).exists():
            client.log_artifact(run_id, str(instance.folder / DROPPED_IDS_FILE))
        figure_log = FigureLog(tracking, run_id, instance.folder)
        _add_curves(figure_log, context, stage, instance)
        _add_held_out_images(figure_log, context, instance)
        views = _load_views(context, stage, instance)
        figure_log.add(views.name, image_figures.draw_image_grid(views), views.title)
        add_filters(figure_log, context.recipe, instance)


def _add_curves(figure_log: FigureLog, context: StageContext, stage: Pretrain, instance: StageInstance) -> None:
    rows = read_metrics(instance.folder / METRICS_FILE)
    epochs = stage.length.count_epochs(count_steps_per_epoch(stage, context.splits, instance.seed))
    figure_log.add("curves", curves.plot_loss(rows), "the loss, and the other numbers that the method logs")
    plots = [("watch", curves.plot_feature_metrics(rows), "metrics of the features of held-out images, over epochs")]
    for plot in metric_plots(stage.method.name, epochs, constructor_arguments(stage.method)):
        plots.append((plot.name, curves.plot_periods(rows, plot), f"{plot.title}, a point for every {plot.unit}"))
    for name, figure, caption in plots:
        if figure is not None:
            figure_log.add(name, figure, caption)
    figure_log.add("speed", curves.plot_speed(rows), "speed, learning rate, and the parts of the time of a step")


def _add_held_out_images(figure_log: FigureLog, context: StageContext, instance: StageInstance) -> None:
    """Adds figures of held-out images: the method's own, the images nearest to some of them, and a map."""
    for grid in load_pictures(instance.folder / PICTURES_FILE):
        figure_log.add(grid.name, image_figures.draw_image_grid(grid), grid.title)
    result = instance.result
    assert result is not None
    if "neighbours" not in result:
        return
    found = {name: tensor.numpy() for name, tensor in read_tensors(instance.folder / PRETRAIN_MAP_FILE).items()}
    shown = "held-out images" if len(context.splits.val) else "training images"
    count = f"{len(found['ids']):,} {shown}"
    caption = f"{shown} on the left, and the nearest of {count}; red: of another class"
    figure_log.add("neighbours", image_figures.draw_neighbours(context, result["neighbours"], caption), caption)
    figure = figures.draw_embedding_map(
        {count: (found["points"], name_principal_axes(found["share"]))},
        context.splits.labels[found["ids"]],
        context.store.classes,
    )
    figure_log.add("map", figure, f"{count} at the first two principal components of their features")


def _load_views(context: StageContext, stage: Pretrain, instance: StageInstance) -> ImageGrid:
    """Returns NUM_VIEWED_IMAGES training images in all views of the first two epochs, as the network sees them."""
    loader, ids = build_view_loader(context, stage, instance.seed), context.splits.train[:NUM_VIEWED_IMAGES]
    encoded, rows = loader.read_encoded(ids), []
    for epoch in range(2):
        loaded = loader.load(ids, np.full_like(ids, epoch), encoded)
        # (images, 3, H, W) of each view
        views = to_batch(loaded, torch.device("cpu")).views
        rows += [
            ImageRow(f"epoch {epoch + 1}" + (f", view {k + 1}" if len(views) > 1 else ""), images)
            for k, images in enumerate(views)
        ]
    shown = describe_shown(context.store.pixels.channels)
    return ImageGrid("views", f"augmented views of training images, as the network sees them{shown}", tuple(rows))


def add_progress(figure_log: FigureLog, recipe: Recipe, instances: Sequence[StageInstance]) -> None:
    """Adds the progress of all trainings of encoders in one figure, if several have logged kNN accuracies."""
    trainings = dict[str, list[curves.LoggedTraining]]()
    for instance in instances:
        stage = recipe.stages[instance.stage]
        if stage.makes_encoder and isinstance(stage, TrainingOptions):
            sizes = [view.size for view in stage_kind(stage).list_views(stage, recipe.dataset)]
            passes = sum((size / recipe.dataset.image_size) ** 2 for size in sizes)
            rows = read_metrics(instance.folder / METRICS_FILE)
            trainings.setdefault(instance.stage, []).append(curves.LoggedTraining(rows, stage.batch_size, passes))
    if (figure := curves.plot_progress(trainings)) is not None:
        figure_log.add(
            "progress", figure, "kNN accuracy on held-out images against passes through the network, and seconds"
        )
