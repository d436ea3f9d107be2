"""PASCAL VOC 2007 and 2012, and sets in their layout.

The layout is JPEGImages/, with ImageSets/Main and Annotations/, or ImageSets/Segmentation and SegmentationClass/. An
image has several objects, so it has no label as a whole: the classes that occur, boxes or masks are annotations
(`dataset.annotations`).
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.annotations import Annotation, find_present_classes
from firstlight.pipeline.data.images import BadImage
from firstlight.pipeline.data.images.class_maps import ClassMapRule, interpret_class_map
from firstlight.pipeline.data.images.orientation import AnnotatedFrame
from firstlight.pipeline.data.sources.conventions.split_names import describe_split_names
from firstlight.pipeline.data.sources.files import FileFacts, LocalFiles, decode_path, hash_facts
from firstlight.pipeline.data.sources.folder import FolderSource
from firstlight.pipeline.data.sources.published.image_lists import ImageListing, find_facts, make_listed_source
from firstlight.pipeline.data.sources.published.layout import require_files
from firstlight.pipeline.data.sources.published.voc_classes import (
    MASK_ENDINGS,
    VOC_BOXES,
    VOC_CLASSES,
    VOC_LABEL_MAP,
    VOC_MASKS,
    VOC_YEAR_FOLDER,
    find_mask_files,
    find_set_classes,
    make_mask_rule,
    read_label_map,
)
from firstlight.pipeline.data.sources.published.voc_lists import (
    UNLISTED,
    VOC_MAIN,
    VOC_SEGMENTATION,
    list_split_images,
    make_subsets,
    read_occurrence,
    read_split_lists,
)
from firstlight.pipeline.data.sources.published.voc_names import VOC_IMAGES, ImageNames
from firstlight.pipeline.data.sources.published.voc_xml import (
    MAX_XML_BYTES,
    InvalidObjects,
    parse_objects,
)
from firstlight.pipeline.data.sources.source import (
    Record,
    SourceOptions,
    describe_listing,
    get_local_facts,
    open_local_root,
)
from firstlight.pipeline.errors import UserError, describe_os_error

# No real limit: the size of each mask is compared with that of its image before it is stored
MAX_READ_MASK_PIXELS = 2**28


@dataclass(frozen=True)
class Voc(FolderSource):
    """PASCAL VOC, or a set in its layout, with labels from the lists of its classes."""

    kind = "voc"
    # (n, classes) int8: what the lists of the classes say, or UNLISTED; no columns if that is not asked for
    occurs: np.ndarray = field(kw_only=True)
    # Name of an image -> the file of its mask, if masks are read, and what their values stand for
    masks: Mapping[bytes, bytes] = field(default_factory=dict, kw_only=True)
    mask_rule: ClassMapRule = field(default_factory=lambda: ClassMapRule(0), kw_only=True)
    # `dataset.annotated_orientation`
    annotated_frame: AnnotatedFrame | None = field(default=None, kw_only=True)

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        for index, record in zip(indices.tolist(), super()._read_records(indices), strict=True):
            yield self._annotate_record(index, record) if self.annotations and record.data is not None else record

    def _annotate_record(self, index: int, record: Record) -> Record:
        path = _find_annotation(self.paths[index].as_py(), self.annotations, self.masks)
        try:
            annotation = self._read_mask(path) if "mask" in self.annotations else self._read_objects(index, path)
        except (InvalidObjects, BadImage, OSError) as error:
            return replace(record, data=None, reason=f"{decode_path(path)}: {describe_os_error(error, None)}")
        return replace(
            record, annotation=replace(annotation, frame=self.annotated_frame), annotation_file=decode_path(path)
        )

    def _read_mask(self, path: bytes) -> Annotation:
        """Returns the mask, as a store keeps it.

        Raises:
            BadImage: it is not certain which classes its values are.
            OSError: the file cannot be read.
        """
        mask, readings = interpret_class_map(self._load_file(path), MAX_READ_MASK_PIXELS, self.mask_rule)
        return Annotation(mask=mask, readings=Counter(readings))

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
        objects, size, readings = parse_objects(self._load_file(path))
        known = {name: k for k, name in enumerate(self.classes)}
        for number, found in enumerate(objects, 1):
            if found.name not in known:
                raise InvalidObjects(f"object {number}: {found.name[:60]!r} is no class of the set")
        classes = np.array([known[found.name] for found in objects], np.int64)
        difficult = np.array([found.difficult for found in objects], bool)
        if occurs is not None:
            occurs = np.where(occurs == UNLISTED, find_present_classes(classes, difficult, len(known)), occurs)
        if "boxes" not in self.annotations:
            return Annotation(occurs, readings=readings)
        placed = [k for k, found in enumerate(objects) if found.box is not None]
        boxes = np.array([objects[k].box for k in placed], np.float32).reshape(-1, 4)
        return Annotation(occurs, boxes, classes[placed], difficult[placed], stated_size=size, readings=readings)


def _find_annotation(image: bytes, annotations: Sequence[str], masks: Mapping[bytes, bytes]) -> bytes:
    """Returns Annotations/x.xml for JPEGImages/x.jpg, or SegmentationClass/x.png if masks are asked for."""
    name = image.removeprefix(os.fsencode(VOC_IMAGES) + b"/").rpartition(b".")[0]
    if "mask" in annotations:
        return masks.get(name) or b"%s/%s.png" % (VOC_MASKS.encode(), name)
    return b"%s/%s.xml" % (VOC_BOXES.encode(), name)


def open_voc(dataset: SourceOptions) -> Voc:
    """Lists the images.

    The training split is trainval, or train and val, which also become subsets; the test split is test. If no test list
    is published (2012), train is the training split and val the test split. Masks choose the images of
    ImageSets/Segmentation.

    The classes are those of classes.txt, else VOC's twenty in a folder named like VOC2007 (after `background` for
    masks) unless its objects are of others, else those that occur in Annotations; those of masks are otherwise in
    `dataset.mask_values` or labelmap.txt. If `dataset.annotations` is None, the annotations are what the folder
    has, boxes first.

    Raises:
        UserError: a file is missing, a list is not valid, or there are no classes.
    """
    root = _find_year_folder(open_local_root(dataset))
    require_files(root, VOC_IMAGES)
    annotations = _choose_annotations(root, dataset)
    names = ImageNames(root)
    no_main = not (root / VOC_MAIN).is_dir() and (root / VOC_SEGMENTATION).is_dir()
    folder = VOC_SEGMENTATION if "mask" in annotations or no_main else VOC_MAIN
    lists = read_split_lists(root, folder, names)
    train, test = list_split_images(names, lists)
    indices = {name: index for index, name in enumerate([*train, *test])}
    masks = find_mask_files(root) if "mask" in annotations else {}
    images = (*train.values(), *test.values())
    paths = [_find_annotation(os.fsencode(image.path), annotations, masks) for image in images]
    label_map = read_label_map(root) if "mask" in annotations else {}
    classes, class_notes = find_set_classes(root, dataset, annotations, paths, label_map)
    asked = classes if "present" in annotations else ()
    occurs, class_lists = read_occurrence(root, asked, indices, list(lists) if folder == VOC_MAIN else [], names)
    if "boxes" in annotations or (occurs == UNLISTED).any():
        require_files(root, VOC_BOXES)
    elif "mask" not in annotations:
        # The lists of the classes state all that is asked for
        paths = []
    files = tuple(f"{folder}/{split}.txt" for split in lists)
    listing = ImageListing(root, files, classes, list(train.values()), list(test.values()))
    source = make_listed_source(
        Voc,
        listing,
        dataset,
        annotations=annotations,
        occurs=occurs,
        subsets=make_subsets(lists, indices),
        masks=masks,
        mask_rule=make_mask_rule(classes, dataset.mask_values, label_map),
        annotated_frame=dataset.annotated_orientation,
        notes=(*class_notes, *names.describe_names(), *_describe_unread_masks(root, annotations, dataset)),
    )
    split_note = describe_split_names({split: _name_part(split, lists) for split in lists}, f" of {folder}")
    source = replace(source, reading=(*describe_listing(source), split_note))
    return replace(source, fingerprint=_hash_annotations(source, class_lists, paths)) if annotations else source


def _name_part(split: str, lists: Mapping[str, object]) -> str:
    """Returns what a list of images is for: without a list `test`, `val` is tested on."""
    return "test" if split == "test" or (split == "val" and "test" not in lists) else "train"


def _describe_unread_masks(root: Path, annotations: Sequence[str], dataset: SourceOptions) -> list[str]:
    """Returns a note about masks that are not read, as nothing says which classes they are of."""
    if annotations or dataset.annotations is not None or not (root / VOC_MASKS).is_dir():
        return []
    return [
        f"the masks in {VOC_MASKS} are not read, as nothing names their classes; valid: {VOC_CLASSES}, "
        f"{VOC_LABEL_MAP}, or dataset.mask_values"
    ]


def _hash_annotations(source: Voc, lists: Sequence[str], paths: Sequence[bytes]) -> str:
    """Returns the fingerprint of the source and of its annotations: lists of classes, and files of objects or masks."""
    names = [*lists, *(name for name in (VOC_CLASSES, VOC_LABEL_MAP) if (source.root / name).exists())]
    facts: list[FileFacts] = [(source.fingerprint.encode(), 0, 0), (" ".join(source.annotations).encode(), 0, 0)]
    facts += [get_local_facts(source.root, name) for name in names]
    endings = (*(ending.encode() for ending in MASK_ENDINGS), b".xml")
    return hash_facts(facts + find_facts(source.root, paths, endings))


def _choose_annotations(root: Path, dataset: SourceOptions) -> tuple[str, ...]:
    """Returns the annotations to read, sorted; those that the folder has if `dataset.annotations` is None.

    Raises:
        UserError: masks are asked for, and their files are missing.
    """
    if dataset.annotations is not None:
        if "mask" in dataset.annotations:
            require_files(root, VOC_MASKS, VOC_SEGMENTATION)
        return tuple(sorted(dataset.annotations))
    if (root / VOC_MAIN).is_dir():
        return ("boxes", "present") if (root / VOC_BOXES).is_dir() else ()
    has_files = any((root / name).exists() for name in (VOC_CLASSES, VOC_LABEL_MAP))
    has_classes = has_files or dataset.mask_values or VOC_YEAR_FOLDER.match(root.name)
    return ("mask",) if (root / VOC_MASKS).is_dir() and has_classes else ()


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
