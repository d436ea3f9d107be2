"""ImageNet (ILSVRC 2012) as its archives unpack: train/<wnid>/*.JPEG, val/*.JPEG and the development kit; or val/<wnid>/*.JPEG."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firstlight.pipeline.data.sources.files import text
from firstlight.pipeline.data.sources.folder import Folder
from firstlight.pipeline.data.sources.published import matlab
from firstlight.pipeline.data.sources.published.image_lists import Entry, Listing, files_in, listed_source
from firstlight.pipeline.data.sources.published.layout import lines, need
from firstlight.pipeline.data.sources.source import local_root
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

DEVKITS = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@dataclass(frozen=True)
class ImageNet(Folder):
    kind = "imagenet"


def open_imagenet(dataset: "Dataset") -> ImageNet:
    """Classes are the WordNet ids of the folders of train/, sorted; val/ is the test split."""
    root = local_root(dataset)
    need(root, "train", "val")
    classes = _folders(root / "train")
    if not classes:
        raise UserError(
            f"dataset.root: {str(root / 'train')!r} holds no folders; valid: one for each class, e.g. n01440764"
        )
    index = {wnid: k for k, wnid in enumerate(classes)}
    train = list(_of_folders(root, "train", index))
    test, lists = (list(_of_folders(root, "val", index)), ()) if _folders(root / "val") else _with_devkit(root, index)
    return listed_source(
        ImageNet, Listing(root, lists, tuple(text(os.fsencode(wnid)) for wnid in classes), train, test), dataset
    )


def _folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as scan:
        return tuple(sorted(entry.name for entry in scan if entry.is_dir() and not entry.name.startswith(".")))


def _of_folders(root: Path, split: str, index: dict[str, int]) -> Iterator[Entry]:
    beside = files_in(root, split)
    if beside:
        raise UserError(f"dataset.root: {beside[0]} lies beside the folders of the classes in {str(root / split)!r}")
    for wnid in _folders(root / split):
        if wnid not in index:
            raise UserError(f"dataset.root: {split}/{wnid}: the training split has no class {wnid!r}")
        images = files_in(root, f"{split}/{wnid}")
        if not images:
            raise UserError(f"dataset.root: no images in {str(root / split / wnid)!r}")
        yield from (Entry(path, index[wnid]) for path in images)


def _with_devkit(root: Path, index: dict[str, int]) -> tuple[list[Entry], tuple[str, ...]]:
    """The images of a flat val/, line k of the ground truth being the label of number k, and the files that say so."""
    kit = next((name for name in DEVKITS if (root / name / TRUTH).exists()), DEVKITS[0])
    if not (root / kit).is_dir():
        need(root, DEVKITS[0])
    need(root / kit, TRUTH, META)
    wnids = _wnids(root / kit / META)
    entries = []
    for k, (number, line) in enumerate(lines(root / kit / TRUTH), 1):
        wnid = wnids.get(line)
        if wnid not in index:
            wrong = (
                f"the training split has no class {wnid!r}"
                if wnid
                else f"out of range; valid: an ILSVRC2012_ID of {META}, 1 to {len(wnids)}"
            )
            raise UserError(f"{root / kit / TRUTH}: line {number}: label {line}: {wrong}")
        entries.append(Entry(f"val/ILSVRC2012_val_{k:08d}.JPEG", index[wnid]))
    known = {entry.path for entry in entries}
    stray = next((path for path in files_in(root, "val") if path not in known), None)
    if stray is not None:
        raise UserError(f"dataset.root: {stray} is none of the {len(entries)} images of {root / kit / TRUTH}")
    return entries, (f"{kit}/{TRUTH}", f"{kit}/{META}")


def _wnids(file: Path) -> dict[str, str]:
    """ILSVRC2012_ID as text -> WordNet id; of classes alone, as inner nodes of the tree have numbers too."""
    synsets = matlab.variable(file, "synsets").reshape(-1)
    missing = {"ILSVRC2012_ID", "WNID", "num_children"} - set(synsets.dtype.names or ())
    if missing:
        raise UserError(f"{file}: the variable 'synsets' has no field {sorted(missing)[0]!r}")
    try:
        leaves = [synset for synset in synsets if int(synset["num_children"].item()) == 0]
        return {str(int(synset["ILSVRC2012_ID"].item())): str(synset["WNID"].item()) for synset in leaves}
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: the variable 'synsets' is not as ILSVRC 2012 has it: {error}") from None
