"""PASCAL VOC 2007 and 2012, and sets in their layout: JPEGImages/, and ImageSets/Main with Annotations/ or Segmentation with SegmentationClass/.

An image has several objects, so there is no label of the whole: which classes occur, boxes or masks are annotations (`dataset.annotations`).
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from firstlight.pipeline.data.annotations import VOID, Annotation, occurring
from firstlight.pipeline.data.sources.files import Listed, Local, fingerprint, text
from firstlight.pipeline.data.sources.folder import Folder
from firstlight.pipeline.data.sources.published.image_lists import Entry, Listing, facts_of, files_in, listed_source
from firstlight.pipeline.data.sources.published.layout import class_names, inside, lines, need
from firstlight.pipeline.data.sources.published.voc_xml import MAX_BYTES, BadObjects, names, things
from firstlight.pipeline.data.sources.source import Record, file_facts, local_root
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

IMAGES, BOXES, MASKS, CLASSES = "JPEGImages", "Annotations", "SegmentationClass", "classes.txt"
MAIN, SEGMENTATION = "ImageSets/Main", "ImageSets/Segmentation"
SPLITS = ("train", "val", "trainval", "test")
TWENTY = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
YEAR = re.compile(r"VOC20\d\d")  # a folder with the twenty classes
OCCURS = {"1": 1, "-1": 0, "0": -1}  # in the list of a class; 0: only in objects that are difficult
UNLISTED = -2


@dataclass(frozen=True)
class Voc(Folder):
    kind = "voc"
    occurs: np.ndarray = field(
        kw_only=True
    )  # (n, classes) int8: what the lists of the classes say, or UNLISTED; () of what is not asked

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        for place, record in zip(places.tolist(), super()._records(places), strict=True):
            yield self._annotated(place, record) if self.annotations and record.data is not None else record

    def _annotated(self, place: int, record: Record) -> Record:
        path = _annotated_in(self.paths[place].as_py(), self.annotations)
        try:
            found = Annotation(mask=self._load(path)) if "mask" in self.annotations else self._objects(place, path)
        except (BadObjects, OSError) as error:
            problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
            return replace(record, data=None, reason=f"{text(path)}: {problem}")
        return replace(record, annotation=found, annotated_in=text(path))

    def _objects(self, place: int, path: bytes) -> Annotation:
        """Raises BadObjects, OSError."""
        occurs = self.occurs[place] if "present" in self.annotations else None
        if "boxes" not in self.annotations and occurs is not None and (occurs != UNLISTED).all():
            return Annotation(occurs)
        if Local(self.root).facts(os.fsdecode(path))[1] > MAX_BYTES:
            raise BadObjects(f"is larger than {MAX_BYTES:,} bytes")
        found = things(self._load(path))
        known = {name: k for k, name in enumerate(self.classes)}
        unknown = next(((number, thing.name) for number, thing in enumerate(found, 1) if thing.name not in known), None)
        if unknown is not None:
            raise BadObjects(f"object {unknown[0]}: {unknown[1][:60]!r} is no class of the set")
        classes = np.array([known[thing.name] for thing in found], np.int64)
        difficult = np.array([thing.difficult for thing in found], bool)
        if occurs is not None:
            occurs = np.where(occurs == UNLISTED, occurring(classes, difficult, len(known)), occurs)
        if "boxes" not in self.annotations:
            return Annotation(occurs)
        return Annotation(
            occurs, np.array([thing.box for thing in found], np.float32).reshape(-1, 4), classes, difficult
        )


def _annotated_in(image: bytes, annotations: Sequence[str]) -> bytes:
    """JPEGImages/x.jpg -> Annotations/x.xml, or the mask."""
    name = image.removeprefix(os.fsencode(IMAGES) + b"/").rpartition(b".")[0]
    return b"%s/%s.png" % (MASKS.encode(), name) if "mask" in annotations else b"%s/%s.xml" % (BOXES.encode(), name)


def open_voc(dataset: "Dataset") -> Voc:
    """Training split: trainval, or train and val, which are subsets; test split: test. No test list is published (2012): train, and val to test on.

    Masks choose the images of ImageSets/Segmentation. Classes: of classes.txt, else VOC's twenty in a folder of its name (behind `background`
    for masks), else those that occur in Annotations. `dataset.annotations: null`: what there is, boxes first.
    """
    root = _year(local_root(dataset))
    need(root, IMAGES)
    annotations = _asked(root, dataset.annotations)
    folder = (
        SEGMENTATION
        if "mask" in annotations or (not (root / MAIN).is_dir() and (root / SEGMENTATION).is_dir())
        else MAIN
    )
    lists = _lists(root, folder)
    train, test = _entries(root, lists)
    places = {name: place for place, name in enumerate([*train, *test])}
    paths = [_annotated_in(os.fsencode(entry.path), annotations) for entry in (*train.values(), *test.values())]
    classes = _classes(root, annotations, paths)
    asked = classes if "present" in annotations else ()
    occurs, files = _occurring(root, asked, places, list(lists) if folder == MAIN else [])
    if "boxes" in annotations or (occurs == UNLISTED).any():
        need(root, BOXES)
    elif "mask" not in annotations:
        paths = []  # the lists of the classes say all that is asked
    listing = Listing(
        root, tuple(f"{folder}/{split}.txt" for split in lists), classes, list(train.values()), list(test.values())
    )
    source = listed_source(
        Voc, listing, dataset, annotations=annotations, occurs=occurs, subsets=_subsets(lists, places)
    )
    return replace(source, fingerprint=_facts(source, files, paths)) if annotations else source


def _lists(root: Path, folder: str) -> dict[str, dict[str, None]]:
    """Split -> names of images, of the lists that there are."""
    there = [split for split in SPLITS if (root / folder / f"{split}.txt").exists()]
    if not {"train", "trainval"} & set(there):
        need(root, f"{folder}/trainval.txt")
    return {split: _names(root / folder / f"{split}.txt") for split in there}


def _entries(root: Path, lists: Mapping[str, dict[str, None]]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Name -> image, for training and to test on. An image in both is twice in them."""
    train = {**lists.get("trainval", {}), **lists.get("train", {}), **lists.get("val", {})}
    test = lists.get("test", lists.get("val", {}))
    if "test" not in lists:
        train = {name: None for name in train if name not in test}
    known = {name.rpartition(".")[0]: name for name in files_in(root, IMAGES)}
    found = [
        {name: Entry(known.get(f"{IMAGES}/{name}", f"{IMAGES}/{name}.jpg"), -1) for name in part}
        for part in (train, test)
    ]
    return found[0], found[1]


def _facts(source: Voc, lists: Sequence[str], paths: Sequence[bytes]) -> str:
    """The fingerprint with what annotations are read from: lists of classes, and files of objects or masks."""
    names = [*lists, *([CLASSES] if (source.root / CLASSES).exists() else [])]
    told = ((source.fingerprint.encode(), 0, 0), (" ".join(source.annotations).encode(), 0, 0))
    return fingerprint(
        (*told, *(file_facts(source.root, name) for name in names), *facts_of(source.root, paths, (b".png", b".xml")))
    )


def _asked(root: Path, annotations: Sequence[str] | None) -> tuple[str, ...]:
    """Sorted; None: what the folder has."""
    if annotations is None:
        boxes = (root / MAIN).is_dir() and (root / BOXES).is_dir()
        masks = (
            not (root / MAIN).is_dir()
            and (root / MASKS).is_dir()
            and ((root / CLASSES).exists() or YEAR.fullmatch(root.name))
        )
        return ("boxes", "present") if boxes else ("mask",) if masks else ()
    if "mask" in annotations:
        need(root, MASKS, SEGMENTATION)
    return tuple(sorted(annotations))


def _classes(root: Path, annotations: Sequence[str], paths: Sequence[bytes]) -> tuple[str, ...]:
    if not annotations:
        return ()
    if (root / CLASSES).exists():
        found = class_names(root / CLASSES)
    elif YEAR.fullmatch(root.name):
        found = ("background", *TWENTY) if "mask" in annotations else TWENTY
    elif "mask" in annotations:
        raise UserError(
            f"dataset.root: {str(root / CLASSES)!r} is missing: the names of the masks' values 0, 1, ..., one a line"
        )
    else:
        need(root, BOXES)
        found = _named(root, tuple(facts_of(root, paths, (b".xml",))))
    if "mask" in annotations and len(found) > VOID:
        raise UserError(
            f"{root / CLASSES}: lists {len(found)} classes; valid: at most {VOID}, as masks have 8 bits and {VOID} is void"
        )
    return found


@functools.lru_cache(maxsize=1)  # a run lists its source twice: for its checks, and to prepare it
def _named(root: Path, facts: tuple[Listed, ...]) -> tuple[str, ...]:
    """The names in the files of `facts`, sorted; a file that cannot be used names none, and its image will be quarantined."""
    found: set[str] = set()
    for path, size, _ in facts:
        if 0 <= size <= MAX_BYTES:
            with contextlib.suppress(OSError):
                found |= names(Local(root).read(path))
    if not found:
        raise UserError(
            f"dataset.root: no object in {str(root / BOXES)!r} names a class; valid: files with objects, or dataset.annotations=[]"
        )
    return tuple(sorted(found))


def _occurring(
    root: Path, classes: Sequence[str], places: Mapping[str, int], splits: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """(n, classes) int8 of the lists <class>_<split>.txt, UNLISTED where none tells; and the names of those lists."""
    occurs = np.full((len(places), len(classes)), UNLISTED, np.int8)
    there = set(os.listdir(root / MAIN)) if splits and classes else set()
    found = [
        (k, f"{name}_{split}.txt")
        for k, name in enumerate(classes)
        for split in splits
        if f"{name}_{split}.txt" in there
    ]
    for k, name in found:
        for number, line in lines(root / MAIN / name):
            image, *value = line.split()
            if len(value) != 1 or value[0] not in OCCURS:
                raise UserError(
                    f"{root / MAIN / name}: line {number}: {line[:80]!r} is not an image and one of {', '.join(OCCURS)}"
                )
            place = places.get(image)
            if place is not None and occurs[place, k] not in (UNLISTED, OCCURS[value[0]]):
                raise UserError(
                    f"{root / MAIN / name}: line {number}: {line[:80]!r} is not what another list of {classes[k]!r} says"
                )
            if place is not None:
                occurs[place, k] = OCCURS[value[0]]
    return occurs, [f"{MAIN}/{name}" for _, name in found]


def _subsets(lists: Mapping[str, Mapping[str, None]], places: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The two parts of trainval, where `val` is not the test split."""
    parts = ("train", "val") if "test" in lists or "val" not in lists else ("train",)
    return {name: np.array([places[image] for image in lists[name]], np.int64) for name in parts if lists.get(name)}


def _year(root: Path) -> Path:
    """The folder that holds JPEGImages: `root`, or the only one that VOCdevkit or `root` has."""
    if (root / IMAGES).is_dir():
        return root
    years = [folder for folder in (*root.glob("VOCdevkit/VOC*"), *root.glob("VOC*")) if (folder / IMAGES).is_dir()]
    if len(years) > 1:
        raise UserError(
            f"dataset.root: {str(root)!r} holds {', '.join(sorted(year.name for year in years))}; valid: the folder of one of them"
        )
    return years[0] if years else root


def _names(file: Path) -> dict[str, None]:
    """In order, each once: the first word of a line, as the lists of one class go on with whether it occurs."""
    return {inside(line.split()[0], f"{file}: line {number}"): None for number, line in lines(file)}
