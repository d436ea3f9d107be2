"""Publishes evaluations and retrievals: scores of frozen features, confusion matrices, maps and nearest images."""

import re

from safetensors.torch import load as load_tensors

from firstlight.pipeline.report import figures, neighbours
from firstlight.pipeline.report.publish.publisher import Score, StagePublisher
from firstlight.pipeline.stages.evaluate import EVALUATION_MAP_FILE, Evaluate
from firstlight.pipeline.stages.frozen_features import FEATURE_ARMS
from firstlight.pipeline.stages.projection import name_principal_axes
from firstlight.pipeline.stages.retrieve import INDEX_FOLDER, Retrieve
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.train.context import StageContext

LOOKS = re.compile(r"^(?:pretrained|random)/(knn|probe)(?:_layer(-?\d+))?_test$")
NAMES = {"knn": "kNN", "probe": "probe"}
RANDOM = "random"
LOGGED_BYTES = 100_000_000  # a larger index stays where it is; MLflow gets its manifest


class EvaluatePublisher(StagePublisher[Evaluate]):
    """Publishes scores, signals and confusion matrices."""

    def publish(
        self, tracking: Tracking, run_id: str, worker: StageContext, stage: Evaluate, instance: StageInstance
    ) -> None:
        """Scores, signals and confusion matrices into the MLflow run. Runs on the driver."""
        result = instance.result
        assert result is not None
        album = Album(tracking, run_id, instance.folder)
        _add_map(album, worker, stage, instance)
        for arm in FEATURE_ARMS:
            for layer, ending in zip(stage.layers, stage.layer_suffixes, strict=True):
                numbers = {f"{key}{ending}": value for key, value in result[arm][f"signals{ending}"].items()}
                for measure in ("knn", "probe"):
                    numbers |= {
                        f"{measure}{ending}_{part}": value
                        for part, value in result[arm][measure + ending].items()
                        if part != "weight_decay"
                    }
                tracking.numbers(run_id, numbers, f"{arm}/")
                of = "test" if worker.recipe.score_test else "held-out"
                told = f"linear probe{f' on layer {layer}' if ending else ''}, {arm}: {of} images of a class (%)"
                figure = figures.draw_confusion(result[arm]["confusion" + ending], worker.store.classes, told)
                album.add(f"confusion_{arm}{ending}", figure, told)

    def summarise(self, run: Run) -> dict[str, Score]:
        told = {}
        for key in run.metrics:
            match = LOOKS.match(key)
            if match and key.startswith("pretrained/"):
                text = NAMES[match[1]] + (f" layer {match[2]}" if match[2] else "")
                told[text] = Score(run.metrics[key], run.metrics.get(f"{RANDOM}/{key.partition('/')[2]}"), RANDOM)
        return told


class RetrievePublisher(StagePublisher[Retrieve]):
    """Publishes scores, nearest images and the index."""

    def publish(
        self, tracking: Tracking, run_id: str, worker: StageContext, stage: Retrieve, instance: StageInstance
    ) -> None:
        """Scores, pictures and the index into the MLflow run. Runs on the driver."""
        result, folder, client = instance.result, instance.folder / INDEX_FOLDER, tracking.client
        assert result is not None
        album = Album(tracking, run_id, instance.folder)
        for arm in FEATURE_ARMS:
            if "precision" in result[arm]:
                scores = {f"precision_at_{k}": value for k, value in result[arm]["precision"].items()}
                tracking.numbers(
                    run_id, scores | {"mean_average_precision": result[arm]["mean_average_precision"]}, f"{arm}/"
                )
            told = f"{arm}: the nearest images to the query at the left; those of another class in red"
            album.add(f"neighbours_{arm}", neighbours.picture(worker, result[arm]["shown"], told), told)
        if sum(file.stat().st_size for file in folder.iterdir()) <= LOGGED_BYTES:
            client.log_artifacts(run_id, str(folder), INDEX_FOLDER)
        else:
            client.log_artifact(run_id, str(folder / "manifest.json"), INDEX_FOLDER)

    def summarise(self, run: Run) -> dict[str, Score]:
        key = "mean_average_precision"
        if f"pretrained/{key}" not in run.metrics:
            return {}
        return {"mAP": Score(run.metrics[f"pretrained/{key}"], run.metrics.get(f"{RANDOM}/{key}"), RANDOM)}


def _add_map(album: Album, worker: StageContext, stage: Evaluate, instance: StageInstance) -> None:
    if not (instance.folder / EVALUATION_MAP_FILE).exists():
        return
    found = {name: tensor.numpy() for name, tensor in load_tensors((instance.folder / EVALUATION_MAP_FILE).read_bytes()).items()}
    titles = {"pretrained": "pretrained", "random": "random weights"}
    maps = {titles[arm]: (found[f"{arm}_points"], name_principal_axes(found[f"{arm}_share"])) for arm in FEATURE_ARMS}
    told = f"{len(found['ids']):,} held-out images at the first two principal components of their features"
    album.add("map", figures.draw_embedding_map(maps, worker.splits.labels[found["ids"]], worker.store.classes), told)
