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
their users: `channels_last`, and bfloat16 on a CPU that multiplies it faster.

Arms take turns of some seconds, each in a process of its own, which stands still while others have theirs. The first
steps of each do not count. CPU seconds are those of all processes of an arm.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bench.photographs import link_photographs, prepare_photographs
from bench.timed_training import make_timed_recipe
from bench.turns import ArmCall, StepCounter, TurnTotals, measure_in_turns
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.augment.compiled.loading import compiled_ops
from firstlight.pipeline.run.auto_scale import resolve_scale
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.accelerator.cpu import set_up_cpu
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
# The keys of a stage that `firstlight init` sets for speed.
INIT_KEYS = {"channels_last": True, "precision": "auto"}
# More steps, and epochs, than an arm takes before it is ended.
ENDLESS = 10**6
# The steps of an arm that do not count.
WARMUP_STEPS = 5
# Megabytes of decoded photographs: those of the tests take more than the default of `stream.resident_mb`.
HELD_MB = 2048


@dataclass(frozen=True)
class PeerSetting:
    """The images of a comparison, and its batches."""

    root: Path
    side: int
    batch: int
    # The folder of our stores.
    storage: Path


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
    keys `speed` of its stage. `precision: auto` becomes that of this machine.
    """
    recipe = make_timed_recipe(
        setting.root,
        setting.storage,
        size=setting.side,
        encoder={"name": "timm", "model": PEER_MODEL},
        stage={
            "method": {"name": "simclr", "dim": 128, "hidden": [512]},
            "views": [{"count": 2, "augment": augment}],
            "steps": ENDLESS,
            "batch_size": setting.batch,
            "optimizer": {"name": "SGD", "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4},
            "checkpoint_every": 10**9,
            **speed,
        },
        stream={"resident": resident, "resident_mb": HELD_MB},
        augment=[PEER_CROP, {"op": "horizontal_flip"}],
        dataset={},
    )
    return resolve_scale(recipe)[0]


def list_simclr_ops(side: int) -> list[dict[str, Any]]:
    """Returns the augmentations of lightly's examples: half the jitter and no blur for small images."""
    strength = 1.0 if side >= 64 else 0.5
    jitter = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    ops: list[dict[str, Any]] = [SIMCLR_CROP, {"op": "horizontal_flip"}]
    ops.append({"op": "color_jitter", "p": 0.8, **{name: strength * value for name, value in jitter.items()}})
    ops.append({"op": "random_grayscale", "p": 0.2})
    return [*ops, {"op": "gaussian_blur", "p": 0.5}] if side >= 64 else ops


def train_ours(setting: PeerSetting, resident: str, learn_labels: bool, as_init: bool, count_step: StepCounter) -> None:
    """Trains in our loop: SimCLR, or, with `learn_labels`, the class folders with one view of an image.

    `as_init`: as fast as `firstlight init` sets it.
    """
    torch.manual_seed(0)
    recipe = make_peer_recipe(setting, list_simclr_ops(setting.side), resident, INIT_KEYS if as_init else {})
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
    # A longer training has them loaded by itself.
    compiled_ops.load()
    failures.fault_hook = lambda rank, step: count_step(step)
    try:
        fit(job, learner)
    finally:
        failures.fault_hook = None


def load_batches(setting: PeerSetting, transform: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yields batches without an end; one process loads them."""
    images = ImageFolder(str(setting.root), transform)
    loader: Any = torch.utils.data.DataLoader(
        images, setting.batch, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True
    )
    while True:
        for batch in loader:
            yield batch[0], batch[1]


def repeat_batch(setting: PeerSetting, transform: Any) -> Iterator[tuple[Any, Tensor]]:
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
    count_step: StepCounter,
) -> None:
    halved = False
    if as_init:
        # Our arm on the same images has these keys.
        stage: Any = make_peer_recipe(setting, list_simclr_ops(setting.side), "off", INIT_KEYS).stages["pretrain"]
        halved = stage.precision == "bf16"
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    for step, (images, labels) in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            loss = compute_loss(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        count_step(step)


def _build_backbone() -> nn.Module:
    import timm

    torch.manual_seed(0)
    network: nn.Module = timm.create_model(PEER_MODEL, num_classes=0)
    return network


def train_torch(setting: PeerSetting, load: BatchSource, as_init: bool, count_step: StepCounter) -> None:
    """Trains with torchvision's ImageFolder and torch's DataLoader (`load_batches`), or on other batches of `load`.

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
    _step_through(
        setting,
        load(setting, transform),
        network,
        lambda images, labels: F.cross_entropy(network(images), labels),
        as_init,
        count_step,
    )


def train_lightly(setting: PeerSetting, load: BatchSource, as_init: bool, count_step: StepCounter) -> None:
    """Trains SimCLR as lightly's example of torch does (`load_batches`), or on other batches of `load`.

    `as_init`: as for `train_ours`.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    small = setting.side < 64
    transform = SimCLRTransform(setting.side, cj_strength=0.5 if small else 1.0, gaussian_blur=0.0 if small else 0.5)
    network = nn.Sequential(_build_backbone(), SimCLRProjectionHead(PEER_FEATURES, 512, 128))
    criterion = NTXentLoss()
    _step_through(
        setting,
        load(setting, transform),
        network,
        lambda views, labels: criterion(network(views[0]), network(views[1])),
        as_init,
        count_step,
    )


class _StepsBefore:
    """A hook of a network, called before each step: as many have ended then as it was called before."""

    def __init__(self, count_step: StepCounter) -> None:
        self.ended, self.count_step = itertools.count(), count_step

    def __call__(self, *call: Any) -> None:
        self.count_step(next(self.ended))

    # lightly-train pickles the network with its hooks, and copies have nothing to count.
    def __reduce__(self) -> tuple[Any, ...]:
        return _StepsBefore, (_ignore_step,)


def _ignore_step(step: int) -> None:
    """Counts nothing."""


def train_lightly_train(setting: PeerSetting, count_step: StepCounter) -> None:
    """Trains by `lightly_train.pretrain`. A step ends when the images of the next one reach the network."""
    import lightly_train

    backbone = _build_backbone()
    next(backbone.children()).register_forward_pre_hook(_StepsBefore(count_step))
    with tempfile.TemporaryDirectory() as folder:
        lightly_train.pretrain(
            out=str(Path(folder) / "run"),
            data=str(setting.root),
            model=backbone,
            method="simclr",
            method_args={"hidden_dim": 512},
            epochs=ENDLESS,
            batch_size=setting.batch,
            num_workers=1,
            accelerator="cpu",
            devices=1,
            transform_args={"image_size": (setting.side, setting.side)},
        )


# The peers whose loops can run on batches that are in memory, and whether they learn labels.
LOOPS: dict[str, tuple[Callable[..., None], bool]] = {"torch": (train_torch, True), "lightly": (train_lightly, False)}
PEERS = (*LOOPS, "lightly-train")
PEER = "peer"


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


def list_arms(name: str, setting: PeerSetting) -> dict[str, ArmCall]:
    """Returns the arms of the comparison with a peer: the peer, ours, and the network alone."""
    loop, learn_labels = LOOPS.get(name, (None, False))
    arms: dict[str, ArmCall] = {
        PEER: (train_lightly_train, setting) if loop is None else (loop, setting, load_batches, False)
    }
    for as_init, end in ((False, ""), (True, AS_INIT)):
        arms[f"streamed{end}"] = (train_ours, setting, "off", learn_labels, as_init)
        arms[f"held decoded{end}"] = (train_ours, setting, "on", learn_labels, as_init)
        if loop is not None:
            arms[f"network alone{end}"] = (loop, setting, repeat_batch, as_init)
    return arms


def compare_totals(found: Mapping[str, TurnTotals]) -> list[tuple[str, float, float]]:
    """Returns for each arm but the peer its ratio to the peer, in images per second and per CPU second."""
    peer = found[PEER]
    return [
        (arm, own.steps / own.wall_s / (peer.steps / peer.wall_s), own.steps / own.cpu_s / (peer.steps / peer.cpu_s))
        for arm, own in found.items()
        if arm != PEER
    ]


@click.command(help=__doc__)
@click.option("--cifar", type=click.Path(exists=True, path_type=Path), help="A folder with Parquet files of CIFAR-10.")
@click.option("--photos", type=click.Path(exists=True, path_type=Path), multiple=True, help="Folders of photographs.")
@click.option("--side", "sides", type=int, multiple=True, default=(64, 224), show_default=True, help="Of photographs.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Of a turn.")
@click.option("--batch", type=int, default=64, show_default=True)
@click.option("--rounds", type=int, default=6, show_default=True, help="The turns of each arm.")
@click.option("--peer", "peers", type=click.Choice(PEERS), multiple=True, default=PEERS, show_default=True)
def main(
    cifar: Path | None,
    photos: tuple[Path, ...],
    sides: tuple[int, ...],
    seconds: float,
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
            settings.append(("CIFAR-10, 32 px", PeerSetting(images, 32, batch, root / "c32")))
        if photos:
            images = link_photographs(photos, root / "linked")
            settings += [
                (f"photographs, {side} px", PeerSetting(images, side, batch, root / f"p{side}")) for side in sides
            ]
        # A table as soon as its images are done: the larger ones take long.
        for shown, setting in settings:
            table = Table(shown, "beside it", "images/s, ratio", "images per CPU s, ratio", "steps, and the peer's")
            for name in names:
                found = measure_in_turns(list_arms(name, setting), WARMUP_STEPS, seconds, rounds)
                for arm, wall, cpu in compare_totals(found):
                    table.add_row(name, arm, f"{wall:.2f}", f"{cpu:.2f}", f"{found[arm].steps}, {found[PEER].steps}")
            console.print(table)


if __name__ == "__main__":
    main()
