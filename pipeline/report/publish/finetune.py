"""Publishes fine-tunings: scores of every arm, learning curves, and predictions as pictures."""

import re
from collections.abc import Sequence
from typing import Any

from safetensors.torch import load as load_tensors

from firstlight.pipeline.data.labelled import write_labelled
from firstlight.pipeline.report import curves, figures
from firstlight.pipeline.report.publish.publisher import Score, StagePublisher
from firstlight.pipeline.stages.finetune import Finetune, list_candidates, finetune_ids
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE, DROPPED_IDS_FILE, read_metrics

KEY = 100  # characters of a class's name in a key of MLflow, which takes 250 in all


class FinetunePublisher(StagePublisher[Finetune]):
    """Publishes scores, learning curves, pictures, and which images were learned from."""

    def publish(
        self, tracking: Tracking, run_id: str, worker: StageContext, stage: Finetune, instance: StageInstance
    ) -> None:
        """Scores, learning curves, pictures, and which images were learned from, into the MLflow run. Runs on the driver."""
        result, client = instance.result, tracking.client
        assert result is not None
        album = Album(tracking, run_id, instance.folder)
        of = "test" if worker.recipe.score_test else "held-out"
        for arm in stage.arms:
            tracking.numbers(run_id, {key: value for key, value in result[arm].items() if key != "scores"}, f"{arm}/")
            for part, scores in result[arm]["scores"].items():
                tracking.numbers(run_id, _named(scores, worker.store.classes), f"{arm}/{part}_")
            rows = read_metrics(instance.folder / f"{arm}-lr{result[arm]['lr']:g}" / METRICS_FILE)
            album.add(f"curves_{arm}", curves.plot_loss(rows), f"loss, {arm}, with the learning rate that was chosen")
            pictures = instance.folder / f"{arm}.safetensors"
            if pictures.exists():
                told = f"{of} images, {arm}"
                album.add(f"predicted_{arm}", figures.draw_image_rows(load_tensors(pictures.read_bytes()), told), told)
        tails = instance.folder / next(iter(list_candidates(stage))) / DROPPED_IDS_FILE  # of all candidates: they have one plan
        for file in (
            write_labelled(worker.store, finetune_ids(worker, stage, instance), instance.folder),
            *([tails] if tails.exists() else []),
        ):
            client.log_artifact(run_id, str(file))
        client.log_dict(run_id, result, "finetune.json")

    def summarise(self, run: Run) -> dict[str, Score]:
        """Every arm beside the last."""
        arms = [arm for arm in re.findall(r"\w+", run.params.get("stage.arms", "")) if f"{arm}/test" in run.metrics]
        task = run.params.get("stage.task.name", "test")
        if not arms:
            return {}
        *ours, last = arms
        if not ours:
            return {f"{task}, {last}": Score(run.metrics[f"{last}/test"])}
        return {
            task if arm == "pretrained" else f"{task}, {arm}": Score(
                run.metrics[f"{arm}/test"], run.metrics[f"{last}/test"], last
            )
            for arm in ours
        }


def _named(scores: dict[str, Any], classes: tuple[str, ...]) -> dict[str, float]:
    """Lists by class as a number for each class that has one."""
    single = {name: value for name, value in scores.items() if not isinstance(value, list)}
    lists = {name: value for name, value in scores.items() if isinstance(value, list)}
    keys = metric_keys(classes)
    each = {
        f"{name}/{key}": v
        for name, values in lists.items()
        for key, v in zip(keys, values, strict=True)
        if v is not None
    }
    return single | each


def metric_keys(names: Sequence[str]) -> list[str]:
    """The names as parts of keys that MLflow takes, one for each: what it refuses becomes a low line, and one that is empty, long, no part of a path
    or another's already has its place beside it."""
    keys: list[str] = []
    for place, name in enumerate(names):
        key = re.sub(r"[^\w .:-]", "_", name)
        if not key.strip(".") or len(key) > KEY or (key != name and key in {*keys, *names}):
            key = f"{key[:KEY].strip('.') or 'class'} {place}"
        keys.append(key)
    return keys
