"""Stage: learn an encoder from images without labels. The labels in the store are not looked at."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load as load_tensors

from pipeline import figures
from pipeline.config import Pretrain
from pipeline.durable import write_json
from pipeline.fit import METRICS, Job, fit, read_metrics
from pipeline.handover import save_encoder
from pipeline.stage import RESULT, Instance
from pipeline.tracking import Tracking
from pipeline.worker import Worker
from tasks.collective import barrier, rank
from tasks.encoders import Encoder
from tasks.pretrain import METHODS
from tasks.pretrain.method import Method


def job(worker: Worker, stage: Pretrain, instance: Instance) -> Job:
    """The training of one seed."""
    cls = METHODS[stage.method.name]
    plan = worker.plan(worker.splits.train, stage, instance.seed)
    return Job(instance.folder, stage, plan, worker.loader(stage, cls.views, instance.seed), instance.seed, worker.options, worker.device)


def build(worker: Worker, stage: Pretrain, seed: int) -> Method:
    """The method with its fresh encoder; the weights are drawn from the seed."""
    torch.manual_seed(seed)
    encoder = Encoder(worker.recipe.encoder.model_dump(), worker.recipe.dataset.image_size)
    parameters = {k: v for k, v in stage.method.model_dump().items() if k != "name"}
    return METHODS[stage.method.name](encoder, worker.store.splits["train"].count, seed, **parameters)


def work(worker: Worker, stage: Pretrain, instance: Instance) -> None:
    """Train, and leave `encoder/` and `result.json` in the instance's folder. Runs on every worker."""
    method = build(worker, stage, instance.seed)
    fit(job(worker, stage, instance), method)
    if rank() == 0:
        facts = {"method": stage.method.model_dump(mode="json"), "store": worker.store.hash, "seed": instance.seed}
        save_encoder(method.encoder, instance.folder / "encoder", facts)
        write_json(instance.folder / RESULT, {"images": len(worker.splits.train)})
    barrier()


def files(stage: Pretrain, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / METRICS, instance.label, "")]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Pretrain, instance: Instance) -> None:
    """The encoder and the pictures of a finished training, into its MLflow run. Runs on the driver."""
    client = tracking.client
    folder = instance.folder / "encoder"
    tracking.log_encoder(run_id, folder, instance, stage.register_as if instance.seed == worker.recipe.seeds[0] else None)
    rows = read_metrics(instance.folder / METRICS)
    client.log_figure(run_id, figures.curves(rows), "figures/curves.png")
    client.log_figure(run_id, _views(worker, stage, instance), "figures/views.png")
    weights = load_tensors((folder / "encoder.safetensors").read_bytes())
    first = next(weights[name] for name in sorted(weights) if weights[name].ndim == 4)  # stages.0...
    client.log_figure(run_id, figures.filters(first.numpy()), "figures/filters.png")


def _views(worker: Worker, stage: Pretrain, instance: Instance) -> Figure:
    """Eight images, each in the views of four epochs, as the network sees them."""
    loader, ids = job(worker, stage, instance).loader, worker.splits.train[:8]
    encoded = loader.read(ids)
    epochs = [loader.load(ids, epoch, encoded)["views"] for epoch in range(4)]
    pictures = [views[k, 0] for views in epochs for k in range(len(ids))]
    captions = [f"id {i}, epoch {epoch}" for epoch in range(4) for i in ids.tolist()]
    return figures.images(pictures, captions, "augmented views", columns=len(ids))
