"""ImageNet (ILSVRC 2012) as its archives unpack: train/<wnid>/*.JPEG, val/*.JPEG and the development kit.

The validation images may also be in val/<wnid>/, without the development kit.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from firstlight.pipeline.data.sources.files import decode_path
from firstlight.pipeline.data.sources.folder import FolderSource
from firstlight.pipeline.data.sources.published import matlab
from firstlight.pipeline.data.sources.published.image_lists import (
    ImageListing,
    ListedImage,
    list_image_files,
    make_listed_source,
)
from firstlight.pipeline.data.sources.published.layout import read_numbered_lines, require_files
from firstlight.pipeline.data.sources.source import SourceOptions, open_local_root
from firstlight.pipeline.errors import UserError

DEVKIT_FOLDERS = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")
DEVKIT_TRUTH, DEVKIT_META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@dataclass(frozen=True)
class ImageNet(FolderSource):
    kind = "imagenet"


def open_imagenet(dataset: SourceOptions) -> ImageNet:
    """Lists the images; val/ is the test split. Classes are the WordNet ids that name the folders of train/, sorted.

    Raises:
        UserError: a folder or a file of the development kit is missing, a folder has no images, or a label is no class.
    """
    root = open_local_root(dataset)
    require_files(root, "train", "val")
    classes = _list_class_folders(root / "train")
    if not classes:
        raise UserError(
            f"dataset.root: {str(root / 'train')!r} holds no folders; valid: one for each class, e.g. n01440764"
        )
    class_numbers = {wnid: k for k, wnid in enumerate(classes)}
    train = list(_list_class_images(root, "train", class_numbers))
    lists: tuple[str, ...] = ()
    if _list_class_folders(root / "val"):
        test = list(_list_class_images(root, "val", class_numbers))
    else:
        test, lists = _list_flat_val(root, class_numbers)
    return make_listed_source(
        ImageNet,
        ImageListing(root, lists, tuple(decode_path(os.fsencode(wnid)) for wnid in classes), train, test),
        dataset,
    )


def _list_class_folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as scan:
        return tuple(sorted(entry.name for entry in scan if entry.is_dir() and not entry.name.startswith(".")))


def _list_class_images(root: Path, split: str, class_numbers: dict[str, int]) -> Iterator[ListedImage]:
    """Yields the images of the folders of all classes.

    Raises:
        UserError: an image is outside of these folders, a folder has no images, or is no class of the training split.
    """
    stray = list_image_files(root, split)
    if stray:
        raise UserError(f"dataset.root: {stray[0]} is outside of the folders of the classes in {str(root / split)!r}")
    for wnid in _list_class_folders(root / split):
        if wnid not in class_numbers:
            raise UserError(f"dataset.root: {split}/{wnid}: the training split has no class {wnid!r}")
        images = list_image_files(root, f"{split}/{wnid}")
        if not images:
            raise UserError(f"dataset.root: no images in {str(root / split / wnid)!r}")
        yield from (ListedImage(path, class_numbers[wnid]) for path in images)


def _list_flat_val(root: Path, class_numbers: dict[str, int]) -> tuple[list[ListedImage], tuple[str, ...]]:
    """Returns the images of a flat val/, and the files with their labels: line k of the ground truth labels image k.

    Raises:
        UserError: a file is missing, a label is no class, or an image has no line.
    """
    kit = next((name for name in DEVKIT_FOLDERS if (root / name / DEVKIT_TRUTH).exists()), DEVKIT_FOLDERS[0])
    if not (root / kit).is_dir():
        require_files(root, DEVKIT_FOLDERS[0])
    require_files(root / kit, DEVKIT_TRUTH, DEVKIT_META)
    wnids = _read_wnids(root / kit / DEVKIT_META)
    entries = []
    for k, (number, line) in enumerate(read_numbered_lines(root / kit / DEVKIT_TRUTH), 1):
        wnid = wnids.get(line)
        if wnid not in class_numbers:
            wrong = (
                f"the training split has no class {wnid!r}"
                if wnid
                else f"out of range; valid: an ILSVRC2012_ID of {DEVKIT_META}, 1 to {len(wnids)}"
            )
            raise UserError(f"{root / kit / DEVKIT_TRUTH}: line {number}: label {line}: {wrong}")
        entries.append(ListedImage(f"val/ILSVRC2012_val_{k:08d}.JPEG", class_numbers[wnid]))
    known = {entry.path for entry in entries}
    stray = next((path for path in list_image_files(root, "val") if path not in known), None)
    if stray is not None:
        raise UserError(f"dataset.root: {stray} is none of the {len(entries)} images of {root / kit / DEVKIT_TRUTH}")
    return entries, (f"{kit}/{DEVKIT_TRUTH}", f"{kit}/{DEVKIT_META}")


def _read_wnids(file: Path) -> dict[str, str]:
    """Returns ILSVRC2012_ID as text -> WordNet id, for classes only, as inner nodes of the tree also have numbers.

    Raises:
        UserError: the file has another layout.
    """
    synsets = matlab.read_variable(file, "synsets").reshape(-1)
    missing = {"ILSVRC2012_ID", "WNID", "num_children"} - set(synsets.dtype.names or ())
    if missing:
        raise UserError(f"{file}: the variable 'synsets' has no field {sorted(missing)[0]!r}")
    try:
        leaves = [synset for synset in synsets if int(synset["num_children"].item()) == 0]
        return {str(int(synset["ILSVRC2012_ID"].item())): str(synset["WNID"].item()) for synset in leaves}
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: the variable 'synsets' is not as ILSVRC 2012 has it: {error}") from None
