"""PASCAL VOC 2007 and 2012, and sets in their layout: JPEGImages/, and ImageSets/Main (or Segmentation) with a name a line.

The images without their annotations: an image has several objects, so there is no label of the whole.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.sources.folder import Folder
from pipeline.sources.layout import inside, lines, need
from pipeline.sources.listing import Entry, Listing, files_in, listed_source
from pipeline.sources.source import local_root

if TYPE_CHECKING:
    from pipeline.config import Dataset  # its methods and tasks bring torch, which no reading task needs

IMAGES, SETS, SPLITS = "JPEGImages", ("ImageSets/Main", "ImageSets/Segmentation"), ("train", "val", "trainval", "test")


@dataclass(frozen=True)
class Voc(Folder):
    kind = "voc"


def open_voc(dataset: "Dataset") -> Voc:
    """Training split: trainval, or train and val; test split: test. Where no test list is published (2012): train, and val to test on."""
    root = _year(local_root(dataset))
    need(root, IMAGES)
    folder = next((name for name in SETS if (root / name).is_dir()), SETS[0])
    files = {split: f"{folder}/{split}.txt" for split in SPLITS if (root / folder / f"{split}.txt").exists()}
    if not {"train", "trainval"} & files.keys():
        need(root, f"{folder}/trainval.txt")
    lists = {split: _names(root / name) for split, name in files.items()}
    train = {**lists.get("trainval", {}), **lists.get("train", {}), **lists.get("val", {})}
    test = lists.get("test", lists.get("val", {}))
    if "test" not in lists:
        train = {name: None for name in train if name not in test}
    known = {name.rpartition(".")[0]: name for name in files_in(root, IMAGES)}
    entries = [[Entry(known.get(f"{IMAGES}/{name}", f"{IMAGES}/{name}.jpg"), -1) for name in names] for names in (train, test)]
    return listed_source(Voc, Listing(root, tuple(files.values()), (), *entries), dataset)


def _year(root: Path) -> Path:
    """The folder that holds JPEGImages: `root`, or the only one that VOCdevkit or `root` has."""
    if (root / IMAGES).is_dir():
        return root
    years = [folder for folder in (*root.glob("VOCdevkit/VOC*"), *root.glob("VOC*")) if (folder / IMAGES).is_dir()]
    if len(years) > 1:
        raise UserError(f"dataset.root: {str(root)!r} holds {', '.join(sorted(year.name for year in years))}; valid: the folder of one of them")
    return years[0] if years else root


def _names(file: Path) -> dict[str, None]:
    """In order, each once: the first word of a line, as the lists of one class go on with whether it occurs."""
    return {inside(line.split()[0], f"{file}: line {number}"): None for number, line in lines(file)}
