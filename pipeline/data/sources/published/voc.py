"""PASCAL VOC 2007 and 2012, and sets in their layout.

The layout is JPEGImages/, with ImageSets/Main and Annotations/, or ImageSets/Segmentation and SegmentationClass/. An
image has several objects, so it has no label as a whole: the classes that occur, boxes or masks are annotations
(`dataset.annotations`).
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.annotations import VOID_VALUE, Annotation, find_present_classes
from firstlight.pipeline.data.sources.files import FileFacts, LocalFiles, decode_path, hash_facts
from firstlight.pipeline.data.sources.folder import FolderSource
from firstlight.pipeline.data.sources.published.image_lists import ImageListing, find_facts, make_listed_source
from firstlight.pipeline.data.sources.published.layout import read_class_lines, require_files
from firstlight.pipeline.data.sources.published.voc_lists import (
    UNLISTED,
    VOC_IMAGES,
    VOC_MAIN,
    VOC_SEGMENTATION,
    list_split_images,
    make_subsets,
    read_occurrence,
    read_split_lists,
)
from firstlight.pipeline.data.sources.published.voc_xml import (
    MAX_XML_BYTES,
    InvalidObjects,
    parse_class_names,
    parse_objects,
)
from firstlight.pipeline.data.sources.source import Record, SourceOptions, get_local_facts, open_local_root
from firstlight.pipeline.errors import UserError

VOC_BOXES, VOC_MASKS, VOC_CLASSES = "Annotations", "SegmentationClass", "classes.txt"
VOC_CLASS_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
# A folder of this name has the twenty classes
VOC_YEAR_FOLDER = re.compile(r"VOC20\d\d")


@dataclass(frozen=True)
class Voc(FolderSource):
    """PASCAL VOC, or a set in its layout, with labels from the lists of its classes."""

    kind = "voc"
    # (n, classes) int8: what the lists of the classes say, or UNLISTED; no columns if that is not asked for
    occurs: np.ndarray = field(kw_only=True)

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        for index, record in zip(indices.tolist(), super()._read_records(indices), strict=True):
            yield self._annotate_record(index, record) if self.annotations and record.data is not None else record

    def _annotate_record(self, index: int, record: Record) -> Record:
        path = _find_annotation(self.paths[index].as_py(), self.annotations)
        try:
            if "mask" in self.annotations:
                annotation = Annotation(mask=self._load_file(path))
            else:
                annotation = self._read_objects(index, path)
        except (InvalidObjects, OSError) as error:
            problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
            return replace(record, data=None, reason=f"{decode_path(path)}: {problem}")
        return replace(record, annotation=annotation, annotation_file=decode_path(path))

    def _read_objects(self, index: int, path: bytes) -> Annotation:
        """Returns the classes that occur, and the boxes, as far as they are asked for.

        Raises:
            InvalidObjects: the file cannot be used, or an object is no class of the set.
            OSError: the file cannot be read.
        """
        occurs = self.occurs[index] if "present" in self.annotations else None
        if "boxes" not in self.annotations and occurs is not None and (occurs != UNLISTED).all():
            return Annotation(occurs)
        if LocalFiles(self.root).get_facts(os.fsdecode(path))[1] > MAX_XML_BYTES:
            raise InvalidObjects(f"is larger than {MAX_XML_BYTES:,} bytes")
        objects = parse_objects(self._load_file(path))
        known = {name: k for k, name in enumerate(self.classes)}
        for number, found in enumerate(objects, 1):
            if found.name not in known:
                raise InvalidObjects(f"object {number}: {found.name[:60]!r} is no class of the set")
        classes = np.array([known[found.name] for found in objects], np.int64)
        difficult = np.array([found.difficult for found in objects], bool)
        if occurs is not None:
            occurs = np.where(occurs == UNLISTED, find_present_classes(classes, difficult, len(known)), occurs)
        if "boxes" not in self.annotations:
            return Annotation(occurs)
        boxes = np.array([found.box for found in objects], np.float32).reshape(-1, 4)
        return Annotation(occurs, boxes, classes, difficult)


def _find_annotation(image: bytes, annotations: Sequence[str]) -> bytes:
    """Returns Annotations/x.xml for JPEGImages/x.jpg, or SegmentationClass/x.png if masks are asked for."""
    name = image.removeprefix(os.fsencode(VOC_IMAGES) + b"/").rpartition(b".")[0]
    if "mask" in annotations:
        return b"%s/%s.png" % (VOC_MASKS.encode(), name)
    return b"%s/%s.xml" % (VOC_BOXES.encode(), name)


def open_voc(dataset: SourceOptions) -> Voc:
    """Lists the images.

    The training split is trainval, or train and val, which also become subsets; the test split is test. If no test list
    is published (2012), train is the training split and val the test split. Masks choose the images of
    ImageSets/Segmentation.

    The classes are those of classes.txt, else VOC's twenty in a folder named like VOC2007 (after `background` for
    masks), else those that occur in Annotations. If `dataset.annotations` is None, the annotations are what the folder
    has, boxes first.

    Raises:
        UserError: a file is missing, a list is not valid, or there are no classes.
    """
    root = _find_year_folder(open_local_root(dataset))
    require_files(root, VOC_IMAGES)
    annotations = _choose_annotations(root, dataset.annotations)
    no_main = not (root / VOC_MAIN).is_dir() and (root / VOC_SEGMENTATION).is_dir()
    folder = VOC_SEGMENTATION if "mask" in annotations or no_main else VOC_MAIN
    lists = read_split_lists(root, folder)
    train, test = list_split_images(root, lists)
    indices = {name: index for index, name in enumerate([*train, *test])}
    paths = [_find_annotation(os.fsencode(image.path), annotations) for image in (*train.values(), *test.values())]
    classes = _find_classes(root, annotations, paths)
    asked = classes if "present" in annotations else ()
    occurs, class_lists = read_occurrence(root, asked, indices, list(lists) if folder == VOC_MAIN else [])
    if "boxes" in annotations or (occurs == UNLISTED).any():
        require_files(root, VOC_BOXES)
    elif "mask" not in annotations:
        # The lists of the classes state all that is asked for
        paths = []
    names = tuple(f"{folder}/{split}.txt" for split in lists)
    listing = ImageListing(root, names, classes, list(train.values()), list(test.values()))
    subsets = make_subsets(lists, indices)
    source = make_listed_source(Voc, listing, dataset, annotations=annotations, occurs=occurs, subsets=subsets)
    return replace(source, fingerprint=_hash_annotations(source, class_lists, paths)) if annotations else source


def _hash_annotations(source: Voc, lists: Sequence[str], paths: Sequence[bytes]) -> str:
    """Returns the fingerprint of the source and of its annotations: lists of classes, and files of objects or masks."""
    names = [*lists, *([VOC_CLASSES] if (source.root / VOC_CLASSES).exists() else [])]
    facts: list[FileFacts] = [(source.fingerprint.encode(), 0, 0), (" ".join(source.annotations).encode(), 0, 0)]
    facts += [get_local_facts(source.root, name) for name in names]
    return hash_facts(facts + find_facts(source.root, paths, (b".png", b".xml")))


def _choose_annotations(root: Path, annotations: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the annotations to read, sorted; those that the folder has if `annotations` is None.

    Raises:
        UserError: masks are asked for, and their files are missing.
    """
    if annotations is not None:
        if "mask" in annotations:
            require_files(root, VOC_MASKS, VOC_SEGMENTATION)
        return tuple(sorted(annotations))
    if (root / VOC_MAIN).is_dir():
        return ("boxes", "present") if (root / VOC_BOXES).is_dir() else ()
    has_classes = (root / VOC_CLASSES).exists() or VOC_YEAR_FOLDER.fullmatch(root.name)
    return ("mask",) if (root / VOC_MASKS).is_dir() and has_classes else ()


def _find_classes(root: Path, annotations: Sequence[str], paths: Sequence[bytes]) -> tuple[str, ...]:
    """Returns the names of the classes, see `open_voc`.

    Raises:
        UserError: no file names classes, or there are more than masks can hold.
    """
    if not annotations:
        return ()
    file = root / VOC_CLASSES
    if file.exists():
        classes = read_class_lines(file)
    elif VOC_YEAR_FOLDER.fullmatch(root.name):
        classes = ("background", *VOC_CLASS_NAMES) if "mask" in annotations else VOC_CLASS_NAMES
    elif "mask" in annotations:
        raise UserError(f"dataset.root: {str(file)!r} is missing: the names of the masks' values 0, 1, ..., one a line")
    else:
        require_files(root, VOC_BOXES)
        classes = _collect_class_names(root, tuple(find_facts(root, paths, (b".xml",))))
    if "mask" in annotations and len(classes) > VOID_VALUE:
        raise UserError(
            f"{file}: lists {len(classes)} classes; valid: at most {VOID_VALUE}, "
            f"as masks have 8 bits and {VOID_VALUE} is void"
        )
    return classes


# Cached, as a run lists its source twice: for its checks, and to prepare it
@functools.lru_cache(maxsize=1)
def _collect_class_names(root: Path, facts: tuple[FileFacts, ...]) -> tuple[str, ...]:
    """Returns the sorted names of the objects in the files of `facts`.

    A file that cannot be used names none, and its image will be quarantined.

    Raises:
        UserError: no file names an object.
    """
    names: set[str] = set()
    for path, size, _ in facts:
        if 0 <= size <= MAX_XML_BYTES:
            with contextlib.suppress(OSError):
                names |= parse_class_names(LocalFiles(root).read(path))
    if not names:
        raise UserError(
            f"dataset.root: no object in {str(root / VOC_BOXES)!r} names a class; "
            "valid: files with objects, or dataset.annotations=[]"
        )
    return tuple(sorted(names))


def _find_year_folder(root: Path) -> Path:
    """Returns the folder that holds JPEGImages: `root`, or the only one below VOCdevkit or `root`.

    Raises:
        UserError: there are several.
    """
    if (root / VOC_IMAGES).is_dir():
        return root
    years = [folder for folder in (*root.glob("VOCdevkit/VOC*"), *root.glob("VOC*")) if (folder / VOC_IMAGES).is_dir()]
    if len(years) > 1:
        names = ", ".join(sorted(year.name for year in years))
        raise UserError(f"dataset.root: {str(root)!r} holds {names}; valid: the folder of one of them")
    return years[0] if years else root
