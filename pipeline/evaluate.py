"""Stage: how good are the frozen features? Weighted kNN and linear probe, beside the same network with random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import figures
from pipeline.config import Evaluate
from pipeline.durable import write_json
from pipeline.handover import load_encoder
from pipeline.metrics import METRICS, SweepProgress
from pipeline.stage import RESULT, Instance
from pipeline.tracking import Tracking
from pipeline.worker import Worker, gather_rows
from tasks.collective import barrier, rank
from tasks.downstream.knn import weighted_knn
from tasks.downstream.probe import choose_probe
from tasks.encoders import Encoder, pooled

ARMS = ("pretrained", "random")


def work(worker: Worker, stage: Evaluate, instance: Instance) -> None:
    """Leave `result.json` in the instance's folder. Runs on every worker; the classifiers are fitted on rank 0."""
    encoders = {arm: _encoder(worker, instance, arm) for arm in ARMS}
    parts = _parts(worker)
    features, labels = _features(worker, stage, encoders, np.concatenate(list(parts.values())), instance)
    if rank() == 0:
        sizes = [len(ids) for ids in parts.values()]
        result = {arm: _scores(stage, list(zip(features[arm].split(sizes), labels.split(sizes), strict=True)), worker) for arm in ARMS}
        write_json(instance.folder / RESULT, result)
    barrier()


def _encoder(worker: Worker, instance: Instance, arm: str) -> Encoder:
    size = worker.recipe.dataset.image_size
    if arm == "pretrained":
        assert instance.encoder is not None
        return load_encoder(instance.encoder, size).to(worker.device).eval()
    torch.manual_seed(instance.seed)
    return Encoder(worker.recipe.encoder.model_dump(), size).to(worker.device).eval()


def _parts(worker: Worker) -> dict[str, np.ndarray]:
    """The labelled ids to train, choose and test on."""
    splits = worker.splits
    return {name: ids[splits.labels[ids] >= 0] for name, ids in (("train", splits.train), ("val", splits.val), ("test", splits.test))}


@torch.no_grad()
def _features(worker: Worker, stage: Evaluate, encoders: dict[str, Encoder], ids: np.ndarray, instance: Instance) -> tuple[dict[str, Tensor], Tensor]:
    """(n, d) features of `ids` by encoder, and their (n,) labels, in the order of `ids`, on every worker. The images are decoded once."""
    progress = SweepProgress(instance.folder, len(ids))
    features: dict[str, list[Tensor]] = {arm: [] for arm in encoders}
    labels = []
    for batch in worker.sweep(ids, stage.batch_size):
        for arm, encoder in encoders.items():
            features[arm].append(pooled(encoder(batch.views[0]), "avg").float())
        labels.append(batch.labels)
        progress.advance(len(batch.ids))
    return {arm: gather_rows(rows, len(ids)) for arm, rows in features.items()}, gather_rows(labels, len(ids))


def _scores(stage: Evaluate, sets: list[tuple[Tensor, Tensor]], worker: Worker) -> dict[str, Any]:
    """Accuracies from the (features, labels) of the training, held-out and test images."""
    train, val, test = sets
    classes = len(worker.store.classes)
    knn = {name: _accuracy(weighted_knn(x, *train, stage.knn_k, stage.knn_temperature), y) for name, (x, y) in (("val", val), ("test", test))}
    probe, decay = choose_probe(train, val, classes, stage.probe_weight_decays)
    predicted = probe.predict(test[0])
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((test[1].cpu(), predicted.cpu()), torch.ones(len(predicted), dtype=torch.int64), accumulate=True)
    return {
        "knn": knn,
        "probe": {"val": _accuracy(probe.predict(val[0]), val[1]), "test": _accuracy(predicted, test[1]), "weight_decay": decay},
        "confusion": confusion.tolist(),
        "feature_std": float(torch.nn.functional.normalize(test[0], dim=1).std(0).mean()),
    }


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())


def files(stage: Evaluate, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / METRICS, instance.label, "")]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Evaluate, instance: Instance) -> None:
    """Scores and confusion matrices into the MLflow run. Runs on the driver."""
    result = instance.result
    assert result is not None
    for arm in ARMS:
        scores = {f"{measure}_{part}": result[arm][measure][part] for measure in ("knn", "probe") for part in ("val", "test")}
        tracking.numbers(run_id, {**scores, "feature_std": result[arm]["feature_std"]}, f"{arm}/")
        figure = figures.confusion(result[arm]["confusion"], worker.store.classes, f"linear probe, {arm}: test images of a class (%)")
        tracking.client.log_figure(run_id, figure, f"figures/confusion_{arm}.png")
