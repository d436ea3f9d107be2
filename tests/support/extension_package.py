"""A tiny package that adds a method, a task, an encoder, a source and a logger to Firstlight."""

from pathlib import Path

MODULE = '''
"""What the package adds."""

from dataclasses import replace
from typing import Annotated

from annotated_types import Gt
from torch import nn

from firstlight.pipeline.data.sources.folder import open_folder
from firstlight.pipeline.tracking.loggers.contract import RunLogger
from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.pretrain.simclr import SimClr


class Squeezed(SimClr):
    """SimCLR whose loss is multiplied by a factor.

    `factor`: the factor.
    """

    title = "Squeezed"

    def __init__(self, encoder, info, *, factor: Annotated[float, Gt(0.0)] = 2.0, dim: int = 8) -> None:
        super().__init__(encoder, info, dim=dim)
        self.factor = factor

    def loss(self, outputs, batch):
        found = super().loss(outputs, batch)
        return {**found, "loss": self.factor * found["loss"]}


class Named(Classification):
    """Classification under another name."""


def two_layers(c_in: int, *, width: int = 4) -> list[nn.Module]:
    """Two convolutions.

    `width`: the channels of each.
    """
    return [nn.Conv2d(c_in, width, 3, 2, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))]


def open_loud_folder(dataset):
    """Lists a folder, with the names of its classes in capitals."""
    source = open_folder(dataset)
    return replace(source, classes=tuple(name.upper() for name in source.classes))


class TextLogger(RunLogger):
    """Writes a line for each number."""

    def __init__(self, run):
        self.file = run.storage / f"{run.id}.txt"
        self.lines = self.file.read_text().splitlines() if self.file.exists() else []

    def list_numbers(self):
        return [(line.split()[0], int(line.split()[1]), float(line.split()[2])) for line in self.lines]

    def list_images(self):
        return []

    def log_numbers(self, numbers):
        with open(self.file, "a") as file:
            file.writelines(f"{number.key} {number.step} {number.value}\\n" for number in numbers)

    def log_image(self, name, file, title):
        pass

    def finish(self, status):
        pass
'''

ENTRY_POINTS = {
    "methods": {"squeezed": "loud_extension.parts:Squeezed"},
    "tasks": {"named": "loud_extension.parts:Named"},
    "encoders": {"two_layers": "loud_extension.parts:two_layers"},
    "sources": {"loud": "loud_extension.parts:open_loud_folder"},
    "loggers": {"text": "loud_extension.parts:TextLogger"},
}


def write_package(folder: Path, entries: dict[str, dict[str, str]] | None = None, module: str = MODULE) -> None:
    """Writes the package into `folder` as an installer leaves it: with that folder on the path, it is installed."""
    (folder / "loud_extension").mkdir(parents=True)
    (folder / "loud_extension" / "__init__.py").write_text('"""An extension."""\n')
    (folder / "loud_extension" / "parts.py").write_text(module)
    info = folder / "loud_extension-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud-extension\nVersion: 1.0\n")
    groups = (
        f"[firstlight.{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in (ENTRY_POINTS if entries is None else entries).items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
