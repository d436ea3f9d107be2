"""SimCLR here and by others, with the same network, images, passes and settings: which features are better?

`python -m bench.peer_features --cifar FOLDER --output rows.jsonl` trains the encoder of conf/recipe/study.yaml on its
training images of CIFAR-10, with the settings of its stage `simclr`, which are those of lightly's benchmark:

\b
    ours        in our training loop
    lightly     as lightly's examples do: torchvision's ImageFolder, its SimCLRTransform, a DataLoader with processes
                that load images, its head and its loss
    lightly-train   `lightly_train.pretrain`, if it is installed; its learning rate rises in the first tenth of the
                steps
    ours, as long as ...    ours again, for as many epochs as fit into the time that the other took

The time is that of a clock, in which every arm may use all cores as it does by default: torch's threads, for a peer
also as many processes that load images as there are cores, for ours the threads and the number format of
`firstlight init`. With `--budget cpu-seconds` it is the CPU time of all processes of an arm, which has one thread, one
process that loads, and single precision.

The features of each are scored alike on the test images: weighted kNN and a linear probe. A row is written as soon as
it is there, and rows that the file has are not made again.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from bench.spent_time import SpentTime
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.files import append_json_line
from firstlight.pipeline.run.auto_scale import resolve_scale
from firstlight.pipeline.run.launching.threads import fix_threads
from firstlight.pipeline.stages.features.feature_scores import ScoringOptions, score_features
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.tasks.nn.encoders import Encoder, pool_maps
from firstlight.tasks.nn.feature_extractor import FeatureExtractor

STUDY, SIMCLR_STAGE = "study", "simclr"
OURS, LIGHTLY, LIGHTLY_TRAIN = "ours", "lightly", "lightly-train"
FEATURE_PEERS = (LIGHTLY, LIGHTLY_TRAIN)
CPU = torch.device("cpu")
# The weight decays of the stage `evaluate`.
PROBE_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
# Each budget that arms share, and its name in a row.
SECONDS, CPU_SECONDS = "seconds", "cpu-seconds"
BUDGETS = {SECONDS: "wall_s", CPU_SECONDS: "cpu_s"}


def name_longer(peer: str) -> str:
    """Returns the name of the arm that trains here for the time of a peer."""
    return f"{OURS}, as long as {peer}"


def list_feature_arms(peers: Sequence[str]) -> list[str]:
    """Returns the arms of a comparison, each after those that its length follows from."""
    return [OURS, *(arm for peer in peers for arm in (peer, name_longer(peer)))]


class TrainedPeer(NamedTuple):
    """A trained encoder, the number of its epochs, and the time of the training: the seconds of a clock, and the CPU
    seconds of all its processes.
    """

    encoder: Encoder
    epochs: int
    wall_s: float
    cpu_s: float


def load_study(cifar: Path, storage: Path, budget: str, *changes: str) -> tuple[StageContext, Any]:
    """Returns the study's images in this process, and its stage of SimCLR, of one seed.

    Trainings have all cores and the number format that is the fastest here, or one thread and single precision where
    `budget` is of CPU time. torch has these threads in the whole process.
    """
    speed = ["defaults.pretrain.precision=auto"] if budget == SECONDS else ["scale.threads=1"]
    keys = (f"dataset.root={cifar}", f"storage={storage}", "seeds=[0]", *speed, *changes)
    resolved, _ = resolve_scale(load_recipe(Path(STUDY), keys))
    recipe = fix_threads(resolved, SIMCLR_STAGE)
    store = prepare(recipe.dataset, storage / "stores", lambda: False, lambda done, total: None)
    return StageContext.create(recipe, store, on_ray=False, device=CPU), recipe.stages[SIMCLR_STAGE]


def train_ours_for(context: StageContext, stage: Any, seed: int, folder: Path) -> TrainedPeer:
    """Trains in our loop, without its measurements of features on the way."""
    unwatched = stage.model_copy(update={"watch": stage.watch.model_copy(update={"every": 0})})
    job = pretrain_job.build_job(context, unwatched, StageInstance(SIMCLR_STAGE, seed, "bench", folder))
    method = pretrain_job.build_seeded_method(context, unwatched, job)
    before = SpentTime.read()
    fit(job, method)
    return TrainedPeer(method.exported_encoder(), stage.epochs, *SpentTime.read().since(before))


def train_lightly_on(context: StageContext, stage: Any, seed: int, root: Path) -> TrainedPeer:
    """Trains as lightly's examples do, with the stage's rate, batch, temperature and length.

    `root`: a folder for each class with the training images as files.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    torch.manual_seed(seed)
    encoder = Encoder(context.recipe.network_spec, context.recipe.dataset.image_size)
    width = encoder.shapes[-1][0]
    # The encoder normalises its input.
    transform = SimCLRTransform(encoder.image_size, cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0, normalize=None)
    loader: Any = torch.utils.data.DataLoader(
        ImageFolder(str(root), transform),
        stage.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=torch.get_num_threads(),
        persistent_workers=True,
    )
    head = SimCLRProjectionHead(width, width, 128)
    network = nn.Sequential(encoder, head).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion = NTXentLoss(temperature=stage.method.temperature)
    spec = stage.optimizer
    optimizer = torch.optim.SGD(network.parameters(), lr=spec.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.epochs * len(loader))
    before = SpentTime.read()
    for _ in range(stage.epochs):
        for views, _labels in loader:
            first, second = (head(pool_maps(encoder(view), "avg")) for view in views)
            criterion(first, second).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    # The processes that load images still run, and are counted.
    return TrainedPeer(encoder, stage.epochs, *SpentTime.read().since(before))


class WrappedEncoder(nn.Module):
    """The encoder as lightly-train takes a network of its users. `moments`: those of each forward pass."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.moments: list[SpentTime] = []

    def get_model(self) -> Encoder:
        """Returns the network that is trained."""
        return self.encoder

    def feature_dim(self) -> int:
        """Returns the number of channels of the deepest map."""
        return int(self.encoder.shapes[-1][0])

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the deepest map of (B, 3, S, S) images."""
        self.moments.append(SpentTime.read())
        return {"features": self.encoder(images)[-1]}

    def forward_pool(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the mean of the map, (B, C, 1, 1)."""
        return {"pooled_features": found["features"].mean((2, 3), keepdim=True)}


def train_lightly_train_on(context: StageContext, stage: Any, seed: int, root: Path) -> TrainedPeer:
    """Trains by `lightly_train.pretrain`, with the stage's rate, batch, temperature, augmentations and length.

    `root`: as for `train_lightly_on`. The time is that between its first step and its last.
    """
    import lightly_train

    torch.manual_seed(seed)
    encoder = Encoder(context.recipe.network_spec, context.recipe.dataset.image_size)
    wrapped = WrappedEncoder(encoder)
    hidden = {"hidden_dim": wrapped.feature_dim(), "output_dim": 128}
    with tempfile.TemporaryDirectory() as folder:
        lightly_train.pretrain(
            out=str(Path(folder) / "run"),
            data=str(root),
            model=wrapped,
            method="simclr",
            method_args={"temperature": stage.method.temperature, **hidden},
            optim="sgd",
            optim_args={"lr": stage.optimizer.lr, "momentum": 0.9, "weight_decay": 5e-4},
            epochs=stage.epochs,
            batch_size=stage.batch_size,
            num_workers=torch.get_num_threads(),
            seed=seed,
            accelerator="cpu",
            devices=1,
            precision="32-true",
            transform_args={
                "image_size": (encoder.image_size, encoder.image_size),
                # The encoder normalises its input.
                "normalize": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
                "random_resize": {"min_scale": 0.2, "max_scale": 1.0},
                "color_jitter": {"strength": 0.5},
                "gaussian_blur": None,
            },
        )
    return TrainedPeer(encoder, stage.epochs, *wrapped.moments[-1].since(wrapped.moments[0]))


def write_class_folders(context: StageContext, root: Path) -> Path:
    """Writes the training images as files into a folder for each class, once, and returns `root`."""
    done = root / "done"
    if not done.exists():
        for ids in np.array_split(context.splits.train, max(len(context.splits.train) // 1000, 1)):
            images, labels = context.store.read(ids)
            for number, data, label in zip(ids.tolist(), images, labels.tolist(), strict=True):
                file = root / "images" / f"class{label}" / f"{number:06d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        done.touch()
    return root / "images"


@torch.no_grad()
def score_encoder(context: StageContext, encoder: Encoder) -> dict[str, float]:
    """Returns the test accuracies of weighted kNN (k = 200 where there are as many images) and a linear probe."""
    network = FeatureExtractor(encoder, None, (-1,), "avg").eval()
    sets = []
    for ids in (context.splits.train, context.splits.val, context.splits.test):
        features = [network(batch.views[0])[0] for batch in context.iterate_batches(ids, 512)]
        sets.append((torch.cat(features), torch.from_numpy(context.splits.labels[ids])))
    neighbours = min(200, len(context.splits.train) - 1)
    found = score_features(sets, ScoringOptions(neighbours, 0.1, PROBE_DECAYS, len(context.store.classes)))
    return {"knn": found["knn"]["test"], "probe": found["probe"]["test"]}


def make_row(context: StageContext, stage: Any, arm: str, seed: int) -> dict[str, Any]:
    """Trains one arm with a seed, in this process, and returns its row."""
    storage = Path(context.recipe.storage)
    root = write_class_folders(context, storage / "files")
    if arm == LIGHTLY:
        trained = train_lightly_on(context, stage, seed, root)
    elif arm == LIGHTLY_TRAIN:
        trained = train_lightly_train_on(context, stage, seed, root)
    else:
        with tempfile.TemporaryDirectory(dir=storage) as folder:
            trained = train_ours_for(context, stage, seed, Path(folder) / "job")
    length = {"epochs": trained.epochs, "wall_s": trained.wall_s, "cpu_s": trained.cpu_s}
    return {"arm": arm, "seed": seed, **length, **score_encoder(context, trained.encoder)}


def compare_simclr(
    epochs: int,
    seeds: Sequence[int],
    file: Path,
    make: Callable[[str, int, int], dict[str, Any]],
    peers: Sequence[str],
    budget: str,
) -> list[dict[str, Any]]:
    """Returns the rows of all arms and seeds; those that `file` lacks are made and appended.

    `make(arm, seed, epochs)` returns a row.
    """
    taken = BUDGETS[budget]
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    rows = {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}
    for seed in seeds:
        lengths = dict.fromkeys((OURS, *peers), epochs)
        for arm in list_feature_arms(peers):
            if (arm, seed) not in rows:
                rows[arm, seed] = make(arm, seed, lengths[arm])
                append_json_line(file, rows[arm, seed])
            if arm in peers:
                share = rows[arm, seed][taken] / rows[OURS, seed][taken]
                lengths[name_longer(arm)] = max(int(epochs * share), 1)
    return [rows[arm, seed] for arm in list_feature_arms(peers) for seed in seeds]


def format_rows(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the means of the arms over their seeds, and the standard deviations of scores."""
    table = Table("SimCLR", "epochs", "seconds", "CPU seconds", "kNN", "linear probe")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = []
        for name, scale in (("epochs", 1), ("wall_s", 1), ("cpu_s", 1), ("knn", 100), ("probe", 100)):
            values = scale * np.array([row[name] for row in own])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 and scale > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        table.add_row(arm, *cells)
    return table


@click.command(help=__doc__)
@click.option("--cifar", type=click.Path(exists=True, path_type=Path), required=True, help="A folder with CIFAR-10.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file of the rows.")
@click.option("--storage", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option(
    "--peer", "peers", type=click.Choice(FEATURE_PEERS), multiple=True, default=FEATURE_PEERS, show_default=True
)
@click.option("--budget", type=click.Choice(list(BUDGETS)), default=SECONDS, show_default=True)
@click.option("--arm", type=click.Choice(list_feature_arms(FEATURE_PEERS)), hidden=True)
@click.option("--epochs", type=click.IntRange(min=1), help="Those of the others.  [default: those of the study]")
def main(
    cifar: Path,
    output: Path,
    storage: Path,
    seeds: tuple[int, ...],
    peers: tuple[str, ...],
    budget: str,
    arm: str | None,
    epochs: int | None,
) -> None:
    """Trains what is missing, each in a process of its own, and prints the means of all arms."""
    length = (f"stages.{SIMCLR_STAGE}.epochs={epochs}",) if epochs else ()
    context, stage = load_study(cifar, storage.resolve(), budget, *length)
    if arm is not None:
        print(json.dumps(make_row(context, stage, arm, seeds[0])))
        return
    console = Console(width=120)
    compared = [peer for peer in peers if find_spec(peer.replace("-", "_")) is not None]
    for peer in sorted(set(peers) - set(compared)):
        console.print(f"not compared: {peer} is not installed")

    def make(arm: str, seed: int, epochs: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.peer_features", "--cifar", str(cifar), "--output", str(output)]
        command += ["--storage", str(storage), "--seed", str(seed), "--arm", arm, "--epochs", str(epochs)]
        command += ["--budget", budget]
        # Our processes keep the memory that they free; those of others do as the C library does.
        environment = {**os.environ, **({"GLIBC_TUNABLES": ""} if arm in FEATURE_PEERS else {})}
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        console.print(json.dumps(row), highlight=False, soft_wrap=True)
        return row

    console.print(format_rows(compare_simclr(stage.epochs, seeds, output, make, compared, budget)))


if __name__ == "__main__":
    main()
