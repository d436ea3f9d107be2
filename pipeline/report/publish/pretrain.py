"""Publishes pretrainings: the encoder, curves, and pictures of what was learned."""

import numpy as np
import torch
from safetensors.torch import load as load_tensors

from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.data.labelled import write_labelled
from firstlight.pipeline.report import curves, figures, neighbours
from firstlight.pipeline.report.publish.publisher import Score, StagePublisher
from firstlight.pipeline.stages.artifacts import load_encoder
from firstlight.pipeline.stages.pictures import load_pictures
from firstlight.pipeline.stages.pretrain import PRETRAIN_MAP_FILE, PICTURES_FILE, NUM_VIEWED_IMAGES, Pretrain, pretrain_label_ids, build_view_loader
from firstlight.pipeline.stages.projection import name_principal_axes
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE, DROPPED_IDS_FILE, read_metrics
from firstlight.tasks.pretrain import metric_plots
from firstlight.tasks.visuals import ImageGrid, ImageRow

FILTERED = ("sobel", "high_pass", "rgb_sobel")  # inputs that end with a fixed filter


class PretrainPublisher(StagePublisher[Pretrain]):
    """Publishes the encoder and the pictures of a training, and which images it saw the labels of."""

    def publish(
        self, tracking: Tracking, run_id: str, worker: StageContext, stage: Pretrain, instance: StageInstance
    ) -> None:
        """The encoder and the pictures of a finished training, and which images it saw (the labels of), into its MLflow run. Runs on the driver."""
        client = tracking.client
        folder = instance.folder / "encoder"
        assert instance.result is not None
        tracking.log_encoder(
            run_id, folder, instance, stage.register_as if instance.seed == worker.recipe.seeds[0] else None
        )
        tracking.numbers(run_id, instance.result["accuracy"], "own_classifier/")
        tracking.numbers(run_id, instance.result["held_out"], "held_out/")
        for name in instance.result["handed_on"]:
            client.log_artifacts(run_id, str(instance.folder / name), name)
        if stage.labelled_per_batch:
            client.log_artifact(
                run_id,
                str(write_labelled(worker.store, pretrain_label_ids(worker, stage, instance.seed), instance.folder)),
            )
        if (instance.folder / DROPPED_IDS_FILE).exists():
            client.log_artifact(run_id, str(instance.folder / DROPPED_IDS_FILE))
        album = Album(tracking, run_id, instance.folder)
        _add_curves(album, stage, instance)
        _add_pictures(album, worker, instance)
        views = _views(worker, stage, instance)
        album.add(views.name, figures.draw_image_grid(views), views.title)
        filters = load_encoder(folder, worker.recipe.dataset.image_size).compose_first_filters()
        if filters:
            composed = worker.recipe.encoder.model_dump().get("input") in FILTERED
            told = "filters of the first convolution" + (
                ", with the fixed filter before them: as they act on the image" if composed else ""
            )
            album.add("filters", figures.draw_filters([weights.numpy() for weights in filters], composed), told)

    def summarise(self, run: Run) -> dict[str, Score]:
        told = {"loss": Score(run.metrics["loss"], scale=1.0, unit="")} if "loss" in run.metrics else {}
        for key, text in (("own_classifier/test", "own classifier"), ("watch_knn", "held-out kNN")):
            if key in run.metrics:
                told[text] = Score(run.metrics[key])
        return told


def _add_curves(album: Album, stage: Pretrain, instance: StageInstance) -> None:
    rows = read_metrics(instance.folder / METRICS_FILE)
    album.add("curves", curves.plot_loss(rows), "loss, and what is logged beside it")
    told = "what the features of held-out images tell, over epochs"
    figures_ = [("watch", curves.plot_feature_metrics(rows), told)]
    for curve in metric_plots(stage.method.name, stage.epochs, constructor_arguments(stage.method)):
        figures_.append((curve.name, curves.plot_periods(rows, curve), f"{curve.title}, a point for every {curve.unit}"))
    for name, figure, title in figures_:
        if figure is not None:
            album.add(name, figure, title)
    album.add("speed", curves.plot_speed(rows), "speed, learning rate, and where the time goes")


def _add_pictures(album: Album, worker: StageContext, instance: StageInstance) -> None:
    """Of held-out images: what the method shows, which are nearest to each other, and a map of them."""
    for shown in load_pictures(instance.folder / PICTURES_FILE):
        album.add(shown.name, figures.draw_image_grid(shown), shown.title)
    result = instance.result
    assert result is not None
    if "neighbours" not in result:
        return
    found = {name: tensor.numpy() for name, tensor in load_tensors((instance.folder / PRETRAIN_MAP_FILE).read_bytes()).items()}
    count = f"{len(found['ids']):,} held-out images"
    told = f"held-out images at the left, and the nearest of {count}; those of another class in red"
    album.add("neighbours", neighbours.picture(worker, result["neighbours"], told), told)
    figure = figures.draw_embedding_map(
        {count: (found["points"], name_principal_axes(found["share"]))},
        worker.splits.labels[found["ids"]],
        worker.store.classes,
    )
    album.add("map", figure, f"{count} at the first two principal components of their features")


def _views(worker: StageContext, stage: Pretrain, instance: StageInstance) -> ImageGrid:
    """Eight images, each in all views of two epochs, as the network sees them."""
    loader, ids = build_view_loader(worker, stage, instance.seed), worker.splits.train[:NUM_VIEWED_IMAGES]
    encoded, rows = loader.read_encoded(ids), []
    for epoch in range(2):
        views = (
            torch.from_numpy(np.asarray(loader.load(ids, np.full_like(ids, epoch), encoded)["views"])).permute(
                1, 0, 4, 2, 3
            )
            / 255
        )
        rows += [
            ImageRow(f"epoch {epoch + 1}" + (f", view {k + 1}" if len(views) > 1 else ""), images)
            for k, images in enumerate(views)
        ]
    return ImageGrid("views", "augmented views of training images, as the network sees them", tuple(rows))
