"""Fine-tunings with few labels on photographs, against a bare loop of torch: `python -m bench.few_labels FOLDER`.

FOLDER has a folder for each class. A small convolutional network is fine-tuned from saved weights and from scratch,
with two learning rates each: four trainings, which are scored on held-out images, and the better rate of each start on
test images. The bare loop has torchvision's ImageFolder with its transforms for Pillow, a DataLoader with a process,
and SGD. Ours is the stage `finetune` with the store that it needs, in one process, in as many as there are CPUs, and in
as many with the number format that `firstlight init` writes, which is bfloat16 where a CPU is faster in it. The arms
take turns, each in a process of its own, and the CPU seconds count those of the processes that it starts.
"""

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import (
    CenterCrop,
    Compose,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)

from bench.own_process import run_in_own_process
from bench.spent_time import SpentTime
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.run.auto_scale import resolve_scale
from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.pipeline.run.launch import launch_instances
from firstlight.pipeline.run.launching.side_processes import SideProcesses, count_side_processes
from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.tasks.nn.encoders import Encoder

FEW_LABEL_ARMS = BARE_LOOP, ONE_PROCESS, ALL_CPUS, INIT_SPEED = (
    "torch's loop",
    "ours, one process",
    "ours, all CPUs",
    "ours, all CPUs, as init",
)
# The processes and the number format of ours.
OUR_SPEEDS: dict[str, tuple[int | str, str]] = {
    ONE_PROCESS: (1, "fp32"),
    ALL_CPUS: ("auto", "fp32"),
    INIT_SPEED: ("auto", "auto"),
}
TRIED_RATES, SMALL_NETWORK = (0.03, 0.1), {"name": "convnet", "width": 16, "depth": 4}
FEW_LABEL_BATCH, HELD_OUT_SHARE, SAVED_SEED = 32, 0.2, 7


@dataclass(frozen=True)
class FewLabelSetting:
    """Options that all arms share: the images, the labels of each class, the epochs, and the side of a view."""

    root: Path
    labels: int
    epochs: int
    side: int


def make_few_labels_recipe(setting: FewLabelSetting, storage: Path, processes: int | str, precision: str) -> Recipe:
    """Returns the recipe of the stage `finetune` in this process and, with `processes`, in others beside it."""
    recipe = parse_recipe(
        {
            "name": "few_labels",
            "storage": str(storage),
            "seeds": [0],
            "dataset": {
                "name": "photographs",
                "source": "folder",
                "root": str(setting.root),
                "image_size": setting.side,
                "val_fraction": HELD_OUT_SHARE,
                "test_fraction": HELD_OUT_SHARE,
                "train_augment": [
                    {"op": "random_resized_crop", "scale": [0.2, 1.0]},
                    {"op": "horizontal_flip"},
                ],
                "eval_augment": [{"op": "center_crop"}],
            },
            "encoder": dict(SMALL_NETWORK),
            "scale": {"name": "local", "workers": 0, "gpus_per_worker": 0.0, "processes": processes},
            "stages": {
                "finetune": {
                    "kind": "finetune",
                    "encoder": "runs:/0/encoder",
                    "task": {"name": "classify"},
                    "labels_per_class": setting.labels,
                    "epochs": setting.epochs,
                    "batch_size": FEW_LABEL_BATCH,
                    "channels_last": True,
                    "precision": precision,
                    "learning_rates": list(TRIED_RATES),
                    "optimizer": {"name": "SGD", "lr": TRIED_RATES[0], "momentum": 0.9},
                }
            },
        }
    )
    return resolve_scale(recipe)[0]


def run_our_stage(setting: FewLabelSetting, storage: Path, processes: int | str, precision: str) -> dict[str, Any]:
    """Writes the store and runs the stage. Returns its result."""
    recipe = make_few_labels_recipe(setting, storage, processes, precision)
    # Other weights than those of the start from scratch: two trainings from the same network would be one.
    torch.manual_seed(SAVED_SEED)
    save_encoder(Encoder(recipe.network_spec, setting.side), storage / "encoder", {})
    store = prepare(
        recipe.dataset, storage / "stores", lambda: False, lambda done, total: None, auto_side=find_recipe_side(recipe)
    )
    instance = StageInstance("finetune", 0, "bench", storage / "job", storage / "encoder")
    with SideProcesses(count_side_processes(recipe), lambda line: None) as others:
        launch_instances(recipe, store, [instance], others)
    assert instance.result is not None
    return instance.result


class BareLoop:
    """The same fine-tunings as one writes them with torch and torchvision."""

    def __init__(self, setting: FewLabelSetting) -> None:
        self.setting, side = setting, setting.side
        crop = RandomResizedCrop(side, scale=(0.2, 1.0))
        self.train = ImageFolder(str(setting.root), Compose([crop, RandomHorizontalFlip(), ToTensor()]))
        self.scored = ImageFolder(str(setting.root), Compose([Resize(side), CenterCrop(side), ToTensor()]))
        torch.manual_seed(SAVED_SEED)
        self.weights = Encoder(SMALL_NETWORK, side).state_dict()
        order, share = torch.randperm(len(self.train)).tolist(), int(HELD_OUT_SHARE * len(self.train))
        self.test, self.held_out, rest = order[:share], order[share : 2 * share], order[2 * share :]
        of_class = defaultdict[int, list[int]](list)
        for index in rest:
            of_class[self.train.targets[index]].append(index)
        self.labelled = [index for indices in of_class.values() for index in indices[: setting.labels]]

    def run(self) -> dict[str, float]:
        """Returns the test accuracy of each start, with the rate that is better on held-out images."""
        found = {}
        for start in ("pretrained", "scratch"):
            networks = [self._fine_tune(start, rate) for rate in TRIED_RATES]
            best = max(networks, key=lambda network: self._score(network, self.held_out))
            found[start] = self._score(best, self.test)
        return found

    def _fine_tune(self, start: str, rate: float) -> nn.Module:
        torch.manual_seed(1)
        encoder = Encoder(SMALL_NETWORK, self.setting.side)
        if start == "pretrained":
            encoder.load_state_dict(self.weights)
        network: nn.Module = _Classifier(encoder, len(self.train.classes))
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
        loader = _load(self.train, self.labelled, shuffle=True, drop_last=len(self.labelled) >= FEW_LABEL_BATCH)
        for _ in range(self.setting.epochs):
            for images, labels in loader:
                loss = F.cross_entropy(network(images), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        return network

    @torch.no_grad()
    def _score(self, network: nn.Module, indices: Sequence[int]) -> float:
        network.eval()
        right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in _load(self.scored, indices))
        return right / len(indices)


class _Classifier(nn.Module):
    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.shapes[-1][0], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images)[-1].mean((2, 3)))  # type: ignore[no-any-return]


def _load(images: ImageFolder, indices: Sequence[int], **options: Any) -> Iterable[tuple[Tensor, Tensor]]:
    # A process that was spawned would spawn this one, which imports everything again.
    process: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    return DataLoader(Subset(images, indices), FEW_LABEL_BATCH, **process, **options)


def run_few_labels_arm(arm: str, setting: FewLabelSetting) -> dict[str, float]:
    """Runs an arm in this process. Returns its seconds, the CPU seconds with those of its processes, and the mean test
    accuracy of both starts.
    """
    begun = SpentTime.read()
    with tempfile.TemporaryDirectory() as folder:
        if arm == BARE_LOOP:
            accuracy = sum(BareLoop(setting).run().values()) / 2
        else:
            result = run_our_stage(setting, Path(folder), *OUR_SPEEDS[arm])
            accuracy = sum(result[start]["test"] for start in ("pretrained", "scratch")) / 2
    return {**SpentTime.read().since(begun)._asdict(), "accuracy": accuracy}


def compare_few_labels_arms(setting: FewLabelSetting, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the means of the seconds of each arm over rounds in which they take turns."""
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in FEW_LABEL_ARMS}
    for _, arm in itertools.product(range(rounds), FEW_LABEL_ARMS):
        work: Callable[..., dict[str, float]] = run_few_labels_arm
        rows[arm].append(run_in_own_process(work, arm, setting))
    return {arm: {key: sum(row[key] for row in found) / rounds for key in found[0]} for arm, found in rows.items()}


@click.command(help=__doc__)
@click.argument("root", metavar="FOLDER", type=click.Path(exists=True, path_type=Path))
@click.option("--labels", type=int, default=8, show_default=True, help="The labels of each class.")
@click.option("--epochs", type=int, default=25, show_default=True)
@click.option("--side", type=int, default=64, show_default=True, help="The side of a view in pixels.")
@click.option("--rounds", type=int, default=2, show_default=True)
def main(root: Path, labels: int, epochs: int, side: int, rounds: int) -> None:
    """Prints the seconds of the arms, and how many times as fast as the bare loop they are."""
    found = compare_few_labels_arms(FewLabelSetting(root, labels, epochs, side), rounds)
    table = Table("fine-tunings", "seconds", "times as fast", "CPU seconds", "times as few", "test accuracy")
    bare = found[BARE_LOOP]
    for arm, row in found.items():
        faster, fewer = (f"{bare[key] / row[key]:.2f}" for key in ("wall_s", "cpu_s"))
        table.add_row(arm, f"{row['wall_s']:.1f}", faster, f"{row['cpu_s']:.1f}", fewer, f"{row['accuracy']:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
