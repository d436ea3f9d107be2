"""Stage: how good are the frozen features? Weighted kNN and linear probe, beside the same network with random weights."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.recipe import Evaluate
from firstlight.pipeline.data.splits import spread
from firstlight.pipeline.files import write_atomically, write_json
from firstlight.pipeline.report import figures
from firstlight.pipeline.stages.frozen_features import ARMS, arms, sweep
from firstlight.pipeline.stages.projection import principal, principal_axes
from firstlight.pipeline.stages.stage import RESULT, Instance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.metrics import METRICS
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream.knn import class_scores, hits
from firstlight.tasks.downstream.probe import choose_probe
from firstlight.tasks.feature_metrics import signals

Labelled = tuple[Tensor, Tensor]  # (n, d) features, (n,) labels
MAP, MAPPED = "map.safetensors", 1000  # images on the map, at most
TOP = 5  # reported beside the accuracy where there are more classes


def work(worker: Worker, stage: Evaluate, instance: Instance) -> None:
    """Leave `result.json` in the instance's folder. Runs on every worker; the classifiers are fitted on rank 0."""
    parts = _parts(worker)
    ids = np.concatenate(parts)
    features = sweep(worker, arms(worker, stage, instance), ids, instance, stage.batch_size)
    if rank() == 0:
        sizes = [len(part) for part in parts]
        labels = torch.from_numpy(worker.splits.labels[ids]).to(worker.device).split(sizes)
        result: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
        for arm, layers in features.items():
            for ending, layer in zip(stage.endings, layers, strict=True):
                found = _scores(stage, list(zip(layer.split(sizes), labels, strict=True)), len(worker.store.classes))
                result[arm] |= {f"{name}{ending}": value for name, value in found.items()}
        _save_map(instance, features, np.concatenate([[0], np.cumsum(sizes)])[1:3], ids)
        write_json(instance.folder / RESULT, result)
    barrier()


def _parts(worker: Worker) -> list[np.ndarray]:
    """The labelled ids to train, choose and test on; to train and choose on where the test split is left alone."""
    splits = worker.splits
    wanted = (splits.train, splits.val, *([splits.test] if worker.recipe.score_test else []))
    return [splits.with_target(ids, "label") for ids in wanted]


def _scores(stage: Evaluate, sets: list[Labelled], classes: int) -> dict[str, Any]:
    """Accuracies of one layer, from the training, held-out and test images; signals and confusion of the last of these."""
    train, *judged_sets = sets
    judged = dict(zip(("val", "test"), judged_sets, strict=False))
    val, (last, (shown, known)) = judged["val"], list(judged.items())[-1]
    vote = partial(class_scores, k=stage.knn_k, temperature=stage.knn_temperature, classes=classes)
    votes = {part: (vote(x, *train), y) for part, (x, y) in judged.items()}
    probe, decay = choose_probe(train, val, classes, stage.probe_weight_decays)
    logits = {part: (probe.scores(x), y) for part, (x, y) in judged.items()}
    predicted = logits[last][0].argmax(1)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((known.cpu(), predicted.cpu()), torch.ones(len(predicted), dtype=torch.int64), accumulate=True)
    return {
        "knn": _accuracies(votes),
        "probe": {**_accuracies(logits), "weight_decay": decay},
        "confusion": confusion.tolist(),
        "signals": {"dimensions": shown.shape[1], **signals(shown)},
    }


def _save_map(instance: Instance, features: dict[str, list[Tensor]], held_out: np.ndarray, ids: np.ndarray) -> None:
    """Where up to MAPPED held-out images lie, by the deepest layer that was looked at. `held_out`: the places of the first and behind the last."""
    places = spread(np.arange(*held_out), MAPPED)
    if len(places) < 3 or not all(bool(torch.isfinite(layers[-1][places]).all()) for layers in features.values()):
        return
    found = {"ids": torch.from_numpy(ids[places])}
    for arm, layers in features.items():
        points, share = principal(layers[-1][places].cpu().numpy())
        found |= {f"{arm}_points": torch.from_numpy(points.copy()), f"{arm}_share": torch.from_numpy(share.copy())}
    write_atomically(instance.folder / MAP, save_tensors(found))


def _add_map(album: Album, worker: Worker, stage: Evaluate, instance: Instance) -> None:
    if not (instance.folder / MAP).exists():
        return
    found = {name: tensor.numpy() for name, tensor in load_tensors((instance.folder / MAP).read_bytes()).items()}
    titles = {"pretrained": "pretrained", "random": "random weights"}
    maps = {titles[arm]: (found[f"{arm}_points"], principal_axes(found[f"{arm}_share"])) for arm in ARMS}
    told = f"{len(found['ids']):,} held-out images at the first two principal components of their features"
    album.add("map", figures.embedding_map(maps, worker.splits.labels[found["ids"]], worker.store.classes), told)


def _accuracies(scored: dict[str, Labelled]) -> dict[str, float]:
    """Shares of (n, classes) scores whose highest, and whose five highest, have the (n,) label among them, by part."""
    found = {part: float(hits(scores, labels, 1).double().mean()) for part, (scores, labels) in scored.items()}
    if scored["val"][0].shape[1] > TOP:
        found |= {
            f"{part}_top{TOP}": float(hits(scores, labels, TOP).double().mean())
            for part, (scores, labels) in scored.items()
        }
    return found


def files(stage: Evaluate, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / METRICS, instance.label, "")]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Evaluate, instance: Instance) -> None:
    """Scores, signals and confusion matrices into the MLflow run. Runs on the driver."""
    result = instance.result
    assert result is not None
    album = Album(tracking, run_id, instance.folder)
    _add_map(album, worker, stage, instance)
    for arm in ARMS:
        for layer, ending in zip(stage.layers, stage.endings, strict=True):
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
            figure = figures.confusion(result[arm]["confusion" + ending], worker.store.classes, told)
            album.add(f"confusion_{arm}{ending}", figure, told)
