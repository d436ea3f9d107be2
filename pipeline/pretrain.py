"""Stage: learn an encoder from images without labels, or with few. Labels that the stage does not ask for are withheld from the method."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline import figures
from pipeline.config import Pretrain, arguments
from pipeline.durable import write_atomically, write_json
from pipeline.fit import Job, fit, to_batch
from pipeline.handover import save_encoder, save_network
from pipeline.labelled import write_labelled
from pipeline.metrics import METRICS, TAILS, read_metrics
from pipeline.plan import Batches, Mixed
from pipeline.stage import RESULT, Instance
from pipeline.stream import Loader
from pipeline.tracking import Tracking
from pipeline.watch import Watch
from pipeline.worker import Worker, gather_rows
from tasks.collective import barrier, rank, world
from tasks.encoders import Encoder
from tasks.pretrain import METHODS
from tasks.pretrain.method import Method, Needs, Setting

PICTURES = "pictures.safetensors"
SHOWN = 8  # images in a picture


def needs(stage: Pretrain) -> Needs:
    return METHODS[stage.method.name].needs(**arguments(stage.method))


def job(worker: Worker, stage: Pretrain, instance: Instance) -> Job:
    """The training of one seed."""
    train, labelled = worker.splits.train, _labelled(worker, stage, instance.seed)
    withheld = np.setdiff1d(train, labelled, assume_unique=True)
    plan = _plan(worker, stage, labelled, instance.seed)
    loader = _loader(worker, stage, instance.seed)
    return Job(instance.folder, stage, plan, loader, instance.seed, worker.options, worker.device, withheld)


def _labelled(worker: Worker, stage: Pretrain, seed: int) -> np.ndarray:
    """The ids whose labels the method may see."""
    return worker.splits.few(stage, seed) if stage.labelled_per_batch else worker.splits.train[:0]


def _plan(worker: Worker, stage: Pretrain, labelled: np.ndarray, seed: int) -> Batches:
    if stage.labelled_per_batch == 0:
        return worker.plan(worker.splits.train, stage.batch_size, seed)
    if stage.labelled_per_batch == stage.batch_size:
        return worker.plan(labelled, stage.batch_size, seed)
    rest = np.setdiff1d(worker.splits.train, labelled, assume_unique=True)
    return Mixed(worker.plan(labelled, stage.labelled_per_batch, seed), worker.plan(rest, stage.batch_size - stage.labelled_per_batch, seed))


def _loader(worker: Worker, stage: Pretrain, seed: int) -> Loader:
    views = worker.views(stage, needs(stage).views)
    if stage.first_view == "plain":
        views[0] = worker.recipe.dataset.eval_augment
    return worker.loader(views, seed)


def build(worker: Worker, stage: Pretrain, job: Job) -> Method:
    """The method with its fresh encoder; the weights are drawn from the seed."""
    torch.manual_seed(job.seed)
    encoder = Encoder(worker.recipe.encoder.model_dump(), worker.recipe.dataset.image_size)
    labels = torch.from_numpy(worker.splits.labels[job.plan.ids])
    setting = Setting(len(job.plan.ids), stage.epochs, job.seed, len(worker.store.classes), labels)
    return METHODS[stage.method.name](encoder, setting, **arguments(stage.method))


def work(worker: Worker, stage: Pretrain, instance: Instance) -> None:
    """Train, and leave `encoder/` (and what else the method hands on), pictures and `result.json` in the instance's folder. On every worker."""
    training = job(worker, stage, instance)
    method = build(worker, stage, training)
    fit(training, method, Watch(worker, stage, training, method))
    accuracy, held_out = _accuracy(worker, stage, method), _held_out(worker, stage, method)
    if rank() == 0:
        facts = {"method": stage.method.model_dump(mode="json"), "store": worker.store.hash, "seed": instance.seed}
        save_encoder(method.encoder, instance.folder / "encoder", facts)
        for name, network in method.handed_on().items():
            save_network(network, instance.folder / name, facts)
        _save_pictures(worker, method, instance)
        result = {"images": len(training.plan.ids), "handed_on": sorted(method.handed_on()), "accuracy": accuracy, "held_out": held_out}
        write_json(instance.folder / RESULT, result)
    barrier()


@torch.no_grad()
def _accuracy(worker: Worker, stage: Pretrain, method: Method) -> dict[str, float]:
    """Of the classifier that a method has learned from labels, on held-out and on test images; {} where it has none. Collective."""
    found: dict[str, float] = {}
    if not needs(stage).labels:
        return found
    for part, ids in (("val", worker.splits.val), ("test", worker.splits.test)):
        ids = worker.splits.known(ids, "label")
        if len(ids) >= world():
            right = [(method.predict(batch.views[0]) == batch.labels).double() for batch in worker.sweep(ids, max(stage.batch_size, 256))]  # type: ignore[union-attr]
            found[part] = float(gather_rows(right, len(ids)).mean())
    return found


@torch.no_grad()
def _held_out(worker: Worker, stage: Pretrain, method: Method) -> dict[str, float]:
    """The means over held-out images of what the method tells of each; {} where it tells nothing. Collective."""
    ids = worker.splits.val
    if not method.judged or len(ids) < world():
        return {}
    size = stage.batch_size // (world() * stage.accumulate)  # what fits into memory in the training
    seen = [method.judge(batch) for batch in worker.sweep(ids, size)]
    return {name: float(gather_rows([found[name].double() for found in seen], len(ids)).mean()) for name in method.judged}


@torch.no_grad()
def _save_pictures(worker: Worker, method: Method, instance: Instance) -> None:
    """What the method has to show of held-out images."""
    loader, ids = worker.loader([worker.recipe.dataset.eval_augment], instance.seed), worker.splits.val[:SHOWN]
    if len(ids) == 0:
        return
    shown = method.pictures(to_batch(loader.once(ids), worker.device))
    if shown:
        write_atomically(instance.folder / PICTURES, save_tensors({k: v.cpu().contiguous() for k, v in shown.items()}))


def files(stage: Pretrain, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / METRICS, instance.label, "")]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Pretrain, instance: Instance) -> None:
    """The encoder and the pictures of a finished training, and which images it saw (the labels of), into its MLflow run. Runs on the driver."""
    client = tracking.client
    folder = instance.folder / "encoder"
    assert instance.result is not None
    tracking.log_encoder(run_id, folder, instance, stage.register_as if instance.seed == worker.recipe.seeds[0] else None)
    tracking.numbers(run_id, instance.result["accuracy"], "own_classifier/")
    tracking.numbers(run_id, instance.result["held_out"], "held_out/")
    for name in instance.result["handed_on"]:
        client.log_artifacts(run_id, str(instance.folder / name), name)
    if stage.labelled_per_batch:
        client.log_artifact(run_id, str(write_labelled(worker.store, _labelled(worker, stage, instance.seed), instance.folder)))
    if (instance.folder / TAILS).exists():
        client.log_artifact(run_id, str(instance.folder / TAILS))
    rows = read_metrics(instance.folder / METRICS)
    client.log_figure(run_id, figures.curves(rows), "figures/curves.png")
    client.log_figure(run_id, _views(worker, stage, instance), "figures/views.png")
    if (instance.folder / PICTURES).exists():
        shown = load_tensors((instance.folder / PICTURES).read_bytes())
        client.log_figure(run_id, figures.rows(shown, "held-out images"), "figures/pictures.png")
    weights = load_tensors((folder / "encoder.safetensors").read_bytes())
    first = next(weights[name] for name in sorted(weights) if weights[name].ndim == 4)  # stages.0...
    client.log_figure(run_id, figures.filters(first.numpy()), "figures/filters.png")


def _views(worker: Worker, stage: Pretrain, instance: Instance) -> Figure:
    """Eight images, each in all views of two epochs, as the network sees them."""
    loader, ids = _loader(worker, stage, instance.seed), worker.splits.train[:SHOWN]
    encoded = loader.read(ids)
    epochs = [loader.load(ids, np.full_like(ids, epoch), encoded)["views"] for epoch in range(2)]
    pictures = [views[k, view] for views in epochs for view in range(len(loader.ops)) for k in range(len(ids))]
    captions = [f"id {i}, epoch {epoch}, view {view}" for epoch in range(2) for view in range(len(loader.ops)) for i in ids.tolist()]
    return figures.images(pictures, captions, "augmented views", columns=len(ids))
