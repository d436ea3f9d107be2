"""Stage: learn an encoder from images without labels, or with few. Labels that the stage does not ask for are withheld from the method."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.recipe import Pretrain, arguments
from firstlight.pipeline.data.labelled import write_labelled
from firstlight.pipeline.data.plan import Batches, SemiSupervisedPlan
from firstlight.pipeline.data.splits import spread
from firstlight.pipeline.data.stream import Loader
from firstlight.pipeline.files import write_atomically, write_json
from firstlight.pipeline.report import curves, figures, neighbours
from firstlight.pipeline.stages.artifacts import load_encoder, save_encoder, save_network
from firstlight.pipeline.stages.pictures import load_pictures, save_pictures, with_untrained
from firstlight.pipeline.stages.projection import principal, principal_axes
from firstlight.pipeline.stages.stage import RESULT, Instance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.train.context import Worker, gather_rows
from firstlight.pipeline.train.job import Job, to_batch
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS, TAILS, read_metrics
from firstlight.pipeline.train.monitor import Watch
from firstlight.tasks.collective import barrier, rank, world
from firstlight.tasks.nn.encoders import Encoder, pooled
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.pretrain.method import Method, Needs, Setting
from firstlight.tasks.visuals import Picture, Row

PICTURES, MAP = "pictures.safetensors", "map.safetensors"
SHOWN, MAPPED = 8, 1000  # images in a picture; held-out images that are compared with each other, at most
FILTERED = ("sobel", "high_pass", "rgb_sobel")  # inputs that end with a fixed filter


def needs(stage: Pretrain) -> Needs:
    return METHODS[stage.method.name].needs(**arguments(stage.method))


def job(worker: Worker, stage: Pretrain, instance: Instance) -> Job:
    """The training of one seed."""
    train, labelled = worker.splits.train, _labelled(worker, stage, instance.seed)
    withheld = np.setdiff1d(train, labelled, assume_unique=True)
    plan = _plan(worker, stage, labelled, instance.seed)
    loader = _loader(worker, stage, instance.seed)
    place = instance.folder, stage, plan, loader, instance.seed, worker.options, worker.device
    return Job(*place, withheld, instance.begin, instance.until)


def _labelled(worker: Worker, stage: Pretrain, seed: int) -> np.ndarray:
    """The ids whose labels the method may see."""
    return worker.splits.labelled_subset(stage, seed) if stage.labelled_per_batch else worker.splits.train[:0]


def _plan(worker: Worker, stage: Pretrain, labelled: np.ndarray, seed: int) -> Batches:
    if stage.labelled_per_batch == 0:
        return worker.plan(worker.splits.train, stage.batch_size, seed)
    if stage.labelled_per_batch == stage.batch_size:
        return worker.plan(labelled, stage.batch_size, seed)
    rest = np.setdiff1d(worker.splits.train, labelled, assume_unique=True)
    return SemiSupervisedPlan(
        worker.plan(labelled, stage.labelled_per_batch, seed),
        worker.plan(rest, stage.batch_size - stage.labelled_per_batch, seed),
    )


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
    untrained = _pictures(worker, method, instance, torch.device("cpu"))  # where it is until `fit` places it
    fit(training, method, Watch(worker, stage, training, method))
    accuracy, judged = _accuracy(worker, stage, method), _judged(worker, stage, method)
    held_out = _held_out(worker, stage, method)
    if rank() == 0:
        facts = {"method": stage.method.model_dump(mode="json"), "store": worker.store.hash, "seed": instance.seed}
        save_encoder(method.encoder, instance.folder / "encoder", facts)
        for name, network in method.handed_on().items():
            save_network(network, instance.folder / name, facts)
        save_pictures(
            with_untrained(untrained, _pictures(worker, method, instance, worker.device)), instance.folder / PICTURES
        )
        result = {
            "images": len(training.plan.ids),
            "handed_on": sorted(method.handed_on()),
            "accuracy": accuracy,
            "held_out": judged,
        }
        if held_out is not None:
            result["neighbours"] = neighbours.among(*held_out, worker.splits.labels)
            _save_map(instance, *held_out)
        write_json(instance.folder / RESULT, result)
    barrier()


@torch.no_grad()
def _accuracy(worker: Worker, stage: Pretrain, method: Method) -> dict[str, float]:
    """Of the classifier that a method has learned from labels, on held-out and on test images; {} where it has none. Collective."""
    found: dict[str, float] = {}
    if not needs(stage).labels:
        return found
    for part, ids in (
        ("val", worker.splits.val),
        ("test", worker.splits.test if worker.recipe.score_test else worker.splits.test[:0]),
    ):
        ids = worker.splits.with_target(ids, "label")
        if len(ids) >= world():
            batches = worker.sweep(ids, max(stage.batch_size, 256))
            right = [(method.predict(batch.views[0]) == batch.labels).double() for batch in batches]  # type: ignore[union-attr]
            found[part] = float(gather_rows(right, len(ids)).mean())
    return found


@torch.no_grad()
def _pictures(worker: Worker, method: Method, instance: Instance, device: torch.device) -> tuple[Picture, ...]:
    """What the method, on `device`, has to show of held-out images; on rank 0."""
    ids = worker.splits.val[:SHOWN]
    if rank() != 0 or len(ids) == 0:
        return ()
    batch = to_batch(worker.loader([worker.recipe.dataset.eval_augment], instance.seed).once(ids), device)
    return method.eval().pictures(batch)


@torch.no_grad()
def _held_out(worker: Worker, stage: Pretrain, method: Method) -> tuple[np.ndarray, Tensor] | None:
    """The ids of up to MAPPED held-out images and their (n, C) features; None where they cannot be compared: too few, or no numbers. Collective."""
    ids = spread(worker.splits.val, MAPPED)
    if len(ids) < max(world(), 3):
        return None
    method.eval()
    parts = [
        pooled(method.encoder(batch.views[0]), "avg").float() for batch in worker.sweep(ids, max(stage.batch_size, 256))
    ]
    features = gather_rows(parts, len(ids))
    return (ids, features) if bool(torch.isfinite(features).all()) else None


def _save_map(instance: Instance, ids: np.ndarray, features: Tensor) -> None:
    points, share = principal(features.cpu().numpy())
    found = {"ids": ids, "points": points, "share": share}
    write_atomically(
        instance.folder / MAP, save_tensors({name: torch.from_numpy(array.copy()) for name, array in found.items()})
    )


@torch.no_grad()
def _judged(worker: Worker, stage: Pretrain, method: Method) -> dict[str, float]:
    """The means over held-out images of what the method tells of each; {} where it tells nothing. Collective."""
    ids = worker.splits.val
    if not method.judged or len(ids) < world():
        return {}
    size = stage.batch_size // (world() * stage.accumulate)  # what fits into memory in the training
    seen = [method.judge(batch) for batch in worker.sweep(ids, size)]
    return {
        name: float(gather_rows([found[name].double() for found in seen], len(ids)).mean()) for name in method.judged
    }


def files(stage: Pretrain, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / METRICS, instance.label, "")]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Pretrain, instance: Instance) -> None:
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
            run_id, str(write_labelled(worker.store, _labelled(worker, stage, instance.seed), instance.folder))
        )
    if (instance.folder / TAILS).exists():
        client.log_artifact(run_id, str(instance.folder / TAILS))
    album = Album(tracking, run_id, instance.folder)
    _add_curves(album, stage, instance)
    _add_pictures(album, worker, instance)
    views = _views(worker, stage, instance)
    album.add(views.name, figures.picture(views), views.title)
    filters = load_encoder(folder, worker.recipe.dataset.image_size).first_filters()
    if filters:
        composed = worker.recipe.encoder.model_dump().get("input") in FILTERED
        told = "filters of the first convolution" + (
            ", with the fixed filter before them: as they act on the image" if composed else ""
        )
        album.add("filters", figures.filters([weights.numpy() for weights in filters], composed), told)


def _add_curves(album: Album, stage: Pretrain, instance: Instance) -> None:
    rows = read_metrics(instance.folder / METRICS)
    album.add("curves", curves.loss(rows), "loss, and what is logged beside it")
    told = "what the features of held-out images tell, over epochs"
    figures_ = [("watch", curves.watched(rows), told)]
    for curve in METHODS[stage.method.name].curves(stage.epochs, **arguments(stage.method)):
        figures_.append((curve.name, curves.periods(rows, curve), f"{curve.title}, a point for every {curve.unit}"))
    for name, figure, title in figures_:
        if figure is not None:
            album.add(name, figure, title)
    album.add("speed", curves.speed(rows), "speed, learning rate, and where the time goes")


def _add_pictures(album: Album, worker: Worker, instance: Instance) -> None:
    """Of held-out images: what the method shows, which are nearest to each other, and a map of them."""
    for shown in load_pictures(instance.folder / PICTURES):
        album.add(shown.name, figures.picture(shown), shown.title)
    result = instance.result
    assert result is not None
    if "neighbours" not in result:
        return
    found = {name: tensor.numpy() for name, tensor in load_tensors((instance.folder / MAP).read_bytes()).items()}
    count = f"{len(found['ids']):,} held-out images"
    told = f"held-out images at the left, and the nearest of {count}; those of another class in red"
    album.add("neighbours", neighbours.picture(worker, result["neighbours"], told), told)
    figure = figures.embedding_map(
        {count: (found["points"], principal_axes(found["share"]))},
        worker.splits.labels[found["ids"]],
        worker.store.classes,
    )
    album.add("map", figure, f"{count} at the first two principal components of their features")


def _views(worker: Worker, stage: Pretrain, instance: Instance) -> Picture:
    """Eight images, each in all views of two epochs, as the network sees them."""
    loader, ids = _loader(worker, stage, instance.seed), worker.splits.train[:SHOWN]
    encoded, rows = loader.read(ids), []
    for epoch in range(2):
        views = (
            torch.from_numpy(np.asarray(loader.load(ids, np.full_like(ids, epoch), encoded)["views"])).permute(
                1, 0, 4, 2, 3
            )
            / 255
        )
        rows += [
            Row(f"epoch {epoch + 1}" + (f", view {k + 1}" if len(views) > 1 else ""), images)
            for k, images in enumerate(views)
        ]
    return Picture("views", "augmented views of training images, as the network sees them", tuple(rows))
