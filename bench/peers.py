"""Training beside what one would use instead, in one run: `python -m bench.peers --cifar FOLDER --photos FOLDER`.

The arms have the same network (a small one of timm, so that the images count), images, augmentation and batch. Each has
one process that trains and, but for ours, which loads images in a thread, one that loads images:

\b
    torch           torchvision's ImageFolder under a DataLoader, and a bare loop of SGD on the cross-entropy of the
                    class folders; ours is the same loss in our training loop
    lightly         SimCLR as in lightly's examples; ours is the method `simclr`
    lightly-train   `lightly_train.pretrain` with SimCLR, if it is installed; the same of ours

\b
    network alone   the bare loop of a peer on one batch that stays in memory, on one CPU that keeps the memory it
                    frees: nobody is faster with this network

Ours, and the network alone, also have an arm with the settings that `firstlight init` writes, which peers leave to
their users: `channels_last`, and bfloat16 on a CPU that multiplies tiles of it.

Arms take turns, each in a process of its own. The first steps of each do not count. CPU seconds are those of all
processes of an arm.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import psutil
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bench.own_process import run_in_own_process
from bench.photographs import link_photographs, prepare_photographs
from bench.timed_training import make_timed_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.accelerator.cpu import multiplies_bf16_tiles, set_up_cpu
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.tasks.learner import Batch, Learner
from firstlight.tasks.nn.encoders import Encoder, pool_maps

PEER_MODEL, PEER_FEATURES = "test_resnet", 96
PEER_CROP = {"op": "random_resized_crop", "scale": [0.2, 1.0]}
# The share of the area that SimCLR's crops have in lightly.
SIMCLR_CROP = {"op": "random_resized_crop", "scale": [0.08, 1.0]}
# The end of the name of an arm that has the settings of `firstlight init`.
AS_INIT = ", as init"
# Megabytes of decoded photographs: those of the tests take more than the default of `stream.resident_mb`.
HELD_MB = 2048


@dataclass(frozen=True)
class PeerSetting:
    """The images of a comparison, and its length."""

    root: Path
    side: int
    batch: int
    steps: int
    warmup: int
    # The folder of our stores.
    storage: Path

    @property
    def as_init(self) -> dict[str, Any]:
        """The keys of a stage that `firstlight init` sets for speed, on this CPU."""
        return {"channels_last": True, "precision": "bf16" if multiplies_bf16_tiles() else "fp32"}


@dataclass
class ProcessClock:
    """Reads the clock, and the CPU time of this process and its children, from step `warmup` to step `last`."""

    warmup: int
    last: int
    wall_s: float = 0.0
    cpu_s: float = 0.0
    started: tuple[float, float] = field(default=(0.0, 0.0))

    def look(self, step: int) -> None:
        """Reads the clocks after a step, counted from 1, that ends the warm-up or the measurement."""
        if step not in (self.warmup, self.last):
            return
        now = (time.perf_counter(), read_tree_seconds())
        if step == self.warmup:
            self.started = now
        else:
            self.wall_s, self.cpu_s = now[0] - self.started[0], now[1] - self.started[1]


def read_tree_seconds() -> float:
    """Returns the CPU seconds of this process and of all processes that it has started."""
    own = psutil.Process()
    times = own.cpu_times()
    total = float(times.user + times.system + times.children_user + times.children_system)
    for process in own.children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class LabelledLearner(Learner):
    """The encoder with a linear classifier of the class folders."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(PEER_FEATURES, classes)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.classifier(pool_maps(self.encoder(batch.views[0]), "avg")),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs[0], batch.labels)}


def make_peer_recipe(
    setting: PeerSetting, augment: list[dict[str, Any]], resident: str, speed: Mapping[str, Any]
) -> Recipe:
    """Returns our recipe: the method SimCLR with the projector of lightly's examples, two views with `augment`, and the
    keys `speed` of its stage.
    """
    return make_timed_recipe(
        setting.root,
        setting.storage,
        size=setting.side,
        encoder={"name": "timm", "model": PEER_MODEL},
        stage={
            "method": {"name": "simclr", "dim": 128, "hidden": [512]},
            "views": [{"count": 2, "augment": augment}],
            "steps": setting.steps + setting.warmup,
            "batch_size": setting.batch,
            "optimizer": {"name": "SGD", "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4},
            "checkpoint_every": 10**9,
            **speed,
        },
        stream={"resident": resident, "resident_mb": HELD_MB},
        augment=[PEER_CROP, {"op": "horizontal_flip"}],
        dataset={},
    )


def list_simclr_ops(side: int) -> list[dict[str, Any]]:
    """Returns the augmentations of lightly's examples: half the jitter and no blur for small images."""
    strength = 1.0 if side >= 64 else 0.5
    jitter = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    ops: list[dict[str, Any]] = [SIMCLR_CROP, {"op": "horizontal_flip"}]
    ops.append({"op": "color_jitter", "p": 0.8, **{name: strength * value for name, value in jitter.items()}})
    ops.append({"op": "random_grayscale", "p": 0.2})
    return [*ops, {"op": "gaussian_blur", "p": 0.5}] if side >= 64 else ops


def train_ours(setting: PeerSetting, resident: str, learn_labels: bool, as_init: bool = False) -> ProcessClock:
    """Trains in our loop: SimCLR, or, with `learn_labels`, the class folders with one view of an image.

    `as_init`: as fast as `firstlight init` sets it.
    """
    torch.manual_seed(0)
    speed = setting.as_init if as_init else {}
    recipe = make_peer_recipe(setting, list_simclr_ops(setting.side), resident, speed)
    store = prepare_photographs(recipe, setting.storage / "stores")
    context = StageContext.create(recipe, store, on_ray=False, device=torch.device("cpu"))
    stage: Any = recipe.stages["pretrain"]
    if learn_labels:
        # One view with the augmentations of the data set.
        plain = stage.views[0].model_copy(update={"count": 1, "augment": None})
        stage = stage.model_copy(update={"views": (plain,), "labelled_per_batch": setting.batch})
    folder = setting.storage / f"job-{time.monotonic_ns()}"
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "bench", folder))
    learner: Learner = (
        LabelledLearner(Encoder(recipe.network_spec, setting.side), len(store.classes))
        if learn_labels
        else pretrain_job.build_seeded_method(context, stage, job)
    )
    clock = ProcessClock(setting.warmup, setting.warmup + setting.steps)
    failures.fault_hook = lambda rank, step: clock.look(step)
    try:
        fit(job, learner)
    finally:
        failures.fault_hook = None
    return clock


def _load_batches(setting: PeerSetting, transform: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yields batches without an end; one process loads them."""
    images = ImageFolder(str(setting.root), transform)
    loader: Any = torch.utils.data.DataLoader(
        images, setting.batch, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True
    )
    while True:
        for batch in loader:
            yield batch[0], batch[1]


def _repeat_batch(setting: PeerSetting, transform: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yields the first images of the folder again and again, which are loaded once."""
    set_up_cpu(torch.get_num_threads())
    images = ImageFolder(str(setting.root), transform)
    batch = torch.utils.data.default_collate([images[k] for k in range(setting.batch)])
    while True:
        yield batch[0], batch[1]


# The batches of an arm: images and labels, by its setting and transform.
BatchSource = Callable[[PeerSetting, Any], Iterator[tuple[Any, Tensor]]]


def _step_through(
    setting: PeerSetting,
    batches: Iterator[tuple[Any, Tensor]],
    network: nn.Module,
    compute_loss: Callable[[Any, Tensor], Tensor],
    as_init: bool,
) -> ProcessClock:
    halved = as_init and setting.as_init["precision"] == "bf16"
    if as_init:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clock = ProcessClock(setting.warmup, setting.warmup + setting.steps)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    for step in range(1, clock.last + 1):
        images, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            loss = compute_loss(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.look(step)
    return clock


def _build_backbone() -> nn.Module:
    import timm

    torch.manual_seed(0)
    network: nn.Module = timm.create_model(PEER_MODEL, num_classes=0)
    return network


def train_torch(setting: PeerSetting, load: BatchSource = _load_batches, as_init: bool = False) -> ProcessClock:
    """Trains with torchvision's ImageFolder and torch's DataLoader, or on the batches of `load`.

    `as_init`: as for `train_ours`.
    """
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(setting.side, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ]
    )
    classes = len(ImageFolder(str(setting.root)).classes)
    network = nn.Sequential(_build_backbone(), nn.Linear(PEER_FEATURES, classes))
    return _step_through(
        setting,
        load(setting, transform),
        network,
        lambda images, labels: F.cross_entropy(network(images), labels),
        as_init,
    )


def train_lightly(setting: PeerSetting, load: BatchSource = _load_batches, as_init: bool = False) -> ProcessClock:
    """Trains SimCLR as lightly's example of torch does, or on the batches of `load`.

    `as_init`: as for `train_ours`.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    small = setting.side < 64
    transform = SimCLRTransform(setting.side, cj_strength=0.5 if small else 1.0, gaussian_blur=0.0 if small else 0.5)
    network = nn.Sequential(_build_backbone(), SimCLRProjectionHead(PEER_FEATURES, 512, 128))
    criterion = NTXentLoss()
    return _step_through(
        setting,
        load(setting, transform),
        network,
        lambda views, labels: criterion(network(views[0]), network(views[1])),
        as_init,
    )


def _look_at_next(clock: ProcessClock, begun: Iterator[int], *call: Any) -> None:
    """Reads the clocks before a step, when as many have ended as `begun` counts."""
    clock.look(next(begun))


def train_lightly_train(setting: PeerSetting) -> ProcessClock:
    """Trains by `lightly_train.pretrain`. A step ends when the images of the next one reach the network."""
    import lightly_train

    clock = ProcessClock(setting.warmup, setting.warmup + setting.steps)
    backbone = _build_backbone()
    # lightly-train pickles the network with its hooks.
    next(backbone.children()).register_forward_pre_hook(partial(_look_at_next, clock, itertools.count()))
    with tempfile.TemporaryDirectory() as folder:
        lightly_train.pretrain(
            out=str(Path(folder) / "run"),
            data=str(setting.root),
            model=backbone,
            method="simclr",
            method_args={"hidden_dim": 512},
            epochs=10**6,
            trainer_args={"max_steps": clock.last + 1},
            batch_size=setting.batch,
            num_workers=1,
            accelerator="cpu",
            devices=1,
            transform_args={"image_size": (setting.side, setting.side)},
        )
    return clock


PEERS: dict[str, tuple[Callable[..., ProcessClock], bool]] = {
    "torch": (train_torch, True),
    "lightly": (train_lightly, False),
    "lightly-train": (train_lightly_train, False),
}
PEER = "peer"
# Their loops can run on batches that are in memory.
PEERS_WITH_LOOP = ("torch", "lightly")


def unpack_parquet(folder: Path, target: Path, count: int) -> Path:
    """Writes the first `count` images of Parquet files (`image`, `label`) into a folder for each class."""
    done = 0
    for file in sorted(folder.glob("train*.parquet")):
        for row in pq.read_table(file, columns=["image", "label"]).slice(0, count - done).to_pylist():
            place = target / f"class{row['label']}" / f"{done:06d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"])
            done += 1
        if done >= count:
            break
    return target


def compare_peers(
    setting: PeerSetting, rounds: int, names: Sequence[str], run_arm: Callable[..., ProcessClock] = run_in_own_process
) -> list[tuple[str, str, float, float]]:
    """Returns for each peer, for each of our sources and for the network alone: its ratio to the peer, in images per
    second and per CPU second.

    `run_arm`: calls an arm's function with its arguments.
    """
    found: dict[tuple[str, str], list[ProcessClock]] = {}
    for _ in range(rounds):
        for name in names:
            peer, learn_labels = PEERS[name]
            arms: dict[str, tuple[Any, ...]] = {
                PEER: (peer, setting),
                "streamed": (train_ours, setting, "off", learn_labels),
                "held decoded": (train_ours, setting, "on", learn_labels),
                f"streamed{AS_INIT}": (train_ours, setting, "off", learn_labels, True),
                f"held decoded{AS_INIT}": (train_ours, setting, "on", learn_labels, True),
            }
            if name in PEERS_WITH_LOOP:
                arms["network alone"] = (peer, setting, _repeat_batch)
                arms[f"network alone{AS_INIT}"] = (peer, setting, _repeat_batch, True)
            for arm, call in arms.items():
                found.setdefault((name, arm), []).append(run_arm(*call))
    rows = []
    for (name, arm), clocks in found.items():
        if arm != PEER:
            wall, cpu = (
                sum(getattr(clock, part) for clock in found[name, PEER]) / sum(getattr(clock, part) for clock in clocks)
                for part in ("wall_s", "cpu_s")
            )
            rows.append((name, arm, wall, cpu))
    return rows


@click.command(help=__doc__)
@click.option("--cifar", type=click.Path(exists=True, path_type=Path), help="A folder with Parquet files of CIFAR-10.")
@click.option("--photos", type=click.Path(exists=True, path_type=Path), multiple=True, help="Folders of photographs.")
@click.option("--side", "sides", type=int, multiple=True, default=(64, 224), show_default=True, help="Of photographs.")
@click.option("--steps", type=int, default=30, show_default=True)
@click.option("--batch", type=int, default=64, show_default=True)
@click.option("--rounds", type=int, default=2, show_default=True)
@click.option("--peer", "peers", type=click.Choice(list(PEERS)), multiple=True, default=tuple(PEERS), show_default=True)
def main(
    cifar: Path | None,
    photos: tuple[Path, ...],
    sides: tuple[int, ...],
    steps: int,
    batch: int,
    rounds: int,
    peers: tuple[str, ...],
) -> None:
    """Compares on CIFAR-10 and on photographs, and prints the ratios."""
    torch.set_num_threads(1)
    console = Console(width=120)
    names = [name for name in peers if find_spec(name.replace("-", "_")) is not None]
    for name in sorted(set(peers) - set(names)):
        console.print(f"not compared: {name} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        settings = []
        if cifar is not None:
            images = unpack_parquet(cifar, root / "cifar", 4096)
            settings.append(("CIFAR-10, 32 px", PeerSetting(images, 32, batch, steps, 5, root / "c32")))
        if photos:
            images = link_photographs(photos, root / "linked")
            settings += [
                (f"photographs, {side} px", PeerSetting(images, side, batch, steps, 5, root / f"p{side}"))
                for side in sides
            ]
        # A table as soon as its images are done: the larger ones take long.
        for shown, setting in settings:
            table = Table(shown, "beside it", "images/s, ratio", "images per CPU s, ratio")
            for name, source, wall, cpu in compare_peers(setting, rounds, names):
                table.add_row(name, source, f"{wall:.2f}", f"{cpu:.2f}")
            console.print(table)


if __name__ == "__main__":
    main()
