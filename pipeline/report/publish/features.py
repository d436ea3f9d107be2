"""Publishers of the stages that score frozen features: evaluations and retrievals."""

from collections.abc import Mapping
from typing import Any

from firstlight.pipeline.config.measures import BANK_MEASURE, WEIGHTS_TITLES
from firstlight.pipeline.report import figures, image_figures
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.stages.evaluate import EVALUATION_MAP_FILE
from firstlight.pipeline.stages.features.feature_index import INDEX_FOLDER
from firstlight.pipeline.stages.features.projection import name_principal_axes
from firstlight.pipeline.stages.pictures import read_tensors
from firstlight.pipeline.stages.sections.evaluate import Evaluate
from firstlight.pipeline.stages.sections.retrieve import Retrieve
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.train.context import StageContext

# An index of more bytes is not copied into MLflow, only its manifest is.
MAX_LOGGED_INDEX_BYTES = 100_000_000


class EvaluatePublisher(StagePublisher[Evaluate]):
    """Publishes scores, feature metrics, confusion matrices and a map of the features."""

    def publish(
        self, tracking: TrackingClient, run_id: str, context: StageContext, stage: Evaluate, instance: StageInstance
    ) -> None:
        result = instance.result
        assert result is not None
        figure_log = FigureLog(tracking, run_id, instance.folder)
        _add_feature_map(figure_log, context, stage, instance)
        for arm in stage.compared_arms:
            for layer, ending in zip(stage.layers, stage.layer_suffixes, strict=True):
                tracking.log_results(run_id, _list_numbers(result[arm], ending), f"{arm}/")
                split = "test" if context.recipe.score_test else "held-out"
                probe = f"linear probe on layer {layer}" if ending else "linear probe"
                caption = f"{probe}, {arm}: {split} images of a class (%)"
                figure = figures.draw_confusion(result[arm]["confusion" + ending], context.store.classes, caption)
                figure_log.add(f"confusion_{arm}{ending}", figure, caption)


class RetrievePublisher(StagePublisher[Retrieve]):
    """Publishes scores, nearest images, and the index if it is small."""

    def publish(
        self, tracking: TrackingClient, run_id: str, context: StageContext, stage: Retrieve, instance: StageInstance
    ) -> None:
        result, folder, client = instance.result, instance.folder / INDEX_FOLDER, tracking.client
        assert result is not None
        figure_log = FigureLog(tracking, run_id, instance.folder)
        for arm in stage.compared_arms:
            if "precision" in result[arm]:
                scores = {f"precision_at_{k}": value for k, value in result[arm]["precision"].items()}
                tracking.log_results(
                    run_id, scores | {"mean_average_precision": result[arm]["mean_average_precision"]}, f"{arm}/"
                )
            caption = f"{arm}: the images nearest to the query on the left; red: of another class"
            figure_log.add(
                f"neighbours_{arm}", image_figures.draw_neighbours(context, result[arm]["shown"], caption), caption
            )
        if sum(file.stat().st_size for file in folder.iterdir()) <= MAX_LOGGED_INDEX_BYTES:
            client.log_artifacts(run_id, str(folder), INDEX_FOLDER)
        else:
            client.log_artifact(run_id, str(folder / "manifest.json"), INDEX_FOLDER)


def _list_numbers(result: Mapping[str, Any], ending: str) -> dict[str, float]:
    """Returns the feature metrics and scores of an arm on one layer, by key. `ending`: that of the layer's keys."""
    numbers = {f"{key}{ending}": value for key, value in result[f"signals{ending}"].items()}
    for measure in ("knn", "probe", BANK_MEASURE):
        for part, value in result.get(measure + ending, {}).items():
            if part != "weight_decay":
                numbers[f"{measure}{ending}_{part}"] = value
    return numbers


def _add_feature_map(figure_log: FigureLog, context: StageContext, stage: Evaluate, instance: StageInstance) -> None:
    if not (instance.folder / EVALUATION_MAP_FILE).exists():
        return
    found = {name: tensor.numpy() for name, tensor in read_tensors(instance.folder / EVALUATION_MAP_FILE).items()}
    maps = {
        WEIGHTS_TITLES.get(arm, arm): (found[f"{arm}_points"], name_principal_axes(found[f"{arm}_share"]))
        for arm in stage.compared_arms
    }
    caption = f"{len(found['ids']):,} held-out images at the first two principal components of their features"
    figure_log.add(
        "map", figures.draw_embedding_map(maps, context.splits.labels[found["ids"]], context.store.classes), caption
    )
