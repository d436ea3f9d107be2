"""Stanford Dogs: Images/<wnid>-<breed>/*.jpg, and lists/train_list.mat and test_list.mat that split and label them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firstlight.pipeline.data.sources.folder import Folder
from firstlight.pipeline.data.sources.published import matlab
from firstlight.pipeline.data.sources.published.image_lists import Entry, Listing, listed_source
from firstlight.pipeline.data.sources.published.layout import inside, need
from firstlight.pipeline.data.sources.source import local_root
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

NAMES = ("train_list.mat", "test_list.mat")


@dataclass(frozen=True)
class StanfordDogs(Folder):
    kind = "stanford_dogs"


def open_stanford_dogs(dataset: "Dataset") -> StanfordDogs:
    """Classes are the folders, e.g. n02085620-Chihuahua, in the order of their labels. The lists may lie in lists/, or beside Images/."""
    root = local_root(dataset)
    below = "lists/" if (root / "lists").is_dir() else ""
    names = tuple(below + name for name in NAMES)
    need(root, "Images", *names)
    classes: dict[int, str] = {}
    train, test = (_entries(root / name, classes, known=k > 0) for k, name in enumerate(names))
    return listed_source(
        StanfordDogs, Listing(root, names, tuple(classes[k] for k in range(len(classes))), train, test), dataset
    )


def _entries(file: Path, classes: dict[int, str], known: bool) -> list[Entry]:
    """The images of a list; the training list defines the classes (`known` False), each label of one folder."""
    paths = [str(cell.item()) if cell.size == 1 else "" for cell in matlab.variable(file, "file_list").reshape(-1)]
    labels = matlab.integers(file, "labels").tolist()
    if len(labels) != len(paths):
        raise UserError(f"{file}: has {len(labels)} labels for {len(paths)} files")
    entries = []
    for row, (path, label) in enumerate(zip(paths, labels, strict=True)):
        path = inside(path, f"{file}: row {row}")
        folder = path.partition("/")[0]
        if not known:
            classes.setdefault(label - 1, folder)
        if classes.get(label - 1) != folder:
            there = (
                f"stands for {classes[label - 1]!r}"
                if label - 1 in classes
                else f"is out of range; valid: 1 to {len(classes)}"
            )
            raise UserError(f"{file}: row {row}: label {label} of {path!r} {there}")
        entries.append(Entry(f"Images/{path}", label - 1))
    missing = next((k for k in range(len(classes)) if k not in classes), None)
    if missing is not None:
        raise UserError(
            f"{file}: no image has label {missing + 1}, yet one has label {max(classes) + 1}; valid: 1 to the number of classes"
        )
    return entries
