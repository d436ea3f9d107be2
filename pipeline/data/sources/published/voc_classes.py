"""The classes of a set in VOC's layout, the files of its masks, and what their values stand for.

The classes of masks are those of classes.txt, `dataset.mask_values` or labelmap.txt, which annotation tools write
beside masks: a line `name:red,green,blue:parts:actions` for each class.
"""

import contextlib
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from firstlight.pipeline.data.images.class_maps import VOID_NAME, VOID_VALUE, ClassMapRule, MaskColour
from firstlight.pipeline.data.sources.conventions.reading import MAX_NOTED_NAMES, find_near_twins, show_name
from firstlight.pipeline.data.sources.files import FileFacts, LocalFiles, is_below
from firstlight.pipeline.data.sources.published.image_lists import find_facts
from firstlight.pipeline.data.sources.published.layout import read_class_lines, read_numbered_lines, require_files
from firstlight.pipeline.data.sources.published.voc_xml import MAX_XML_BYTES, parse_class_names
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError, suggest_valid

VOC_BOXES, VOC_MASKS = "Annotations", "SegmentationClass"
VOC_CLASSES, VOC_LABEL_MAP = "classes.txt", "labelmap.txt"
VOC_CLASS_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_NAMES = {name.encode() for name in VOC_CLASS_NAMES}
NAME_TAG = re.compile(rb"<name>\s*([^<]*?)\s*</name>")
# A folder of this name has the twenty classes, unless its objects are of others
VOC_YEAR_FOLDER = re.compile(r"VOC20\d\d\Z", re.ASCII)
# Endings of masks; the first that exists counts.
MASK_ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jpg", ".jpeg")
# Names of classes in labelmap.txt that mean void.
LABEL_MAP_VOID = ("void", "ignore", "unlabeled", "unlabelled")


def find_set_classes(
    root: Path,
    dataset: SourceOptions,
    annotations: Sequence[str],
    paths: Sequence[bytes],
    label_map: Mapping[MaskColour, str],
) -> tuple[tuple[str, ...], list[str]]:
    """Returns the names of the classes, see `open_voc`, and a note if they are not those of the folder's name.

    Raises:
        UserError: no file names classes, or there are more than masks can hold.
    """
    if not annotations:
        return (), []
    file, notes = root / VOC_CLASSES, list[str]()
    if file.exists():
        classes = read_class_lines(file)
    elif "mask" in annotations:
        classes = _find_mask_classes(root, dataset, label_map)
    else:
        classes, notes = _find_object_classes(root, paths)
        notes += [
            f"classes that look alike are kept apart: {' and '.join(map(repr, map(show_name, twins)))}"
            for twins in find_near_twins(classes)[:MAX_NOTED_NAMES]
        ]
    if "mask" in annotations and len(classes) > VOID_VALUE:
        raise UserError(
            f"{file}: lists {len(classes)} classes; valid: at most {VOID_VALUE}, "
            f"as masks have 8 bits and {VOID_VALUE} is void"
        )
    return classes, notes


def _find_mask_classes(root: Path, dataset: SourceOptions, label_map: Mapping[MaskColour, str]) -> tuple[str, ...]:
    named = dict.fromkeys(dataset.mask_values or label_map.values())
    if classes := tuple(name for name in named if name != VOID_NAME and not is_void_name(name)):
        return classes
    if VOC_YEAR_FOLDER.match(root.name):
        return ("background", *VOC_CLASS_NAMES)
    raise UserError(
        f"dataset.root: {str(root / VOC_CLASSES)!r} is missing: the names of the masks' values 0, 1, ..., one a line; "
        "or state dataset.mask_values"
    )


def _find_object_classes(root: Path, paths: Sequence[bytes]) -> tuple[tuple[str, ...], list[str]]:
    """Returns the classes of objects: VOC's twenty in a folder named like VOC2007, unless others occur."""
    is_year = VOC_YEAR_FOLDER.match(root.name) is not None
    if is_year and not (root / VOC_BOXES).is_dir():
        return VOC_CLASS_NAMES, []
    require_files(root, VOC_BOXES)
    occurring = _collect_class_names(root, tuple(find_facts(root, paths, (b".xml",))), is_year)
    if is_year and set(occurring) <= set(VOC_CLASS_NAMES):
        return VOC_CLASS_NAMES, []
    if not occurring:
        raise UserError(
            f"dataset.root: no object in the files of {str(root / VOC_BOXES)!r} that the lists name has a class; "
            "valid: files with objects, or dataset.annotations=[]"
        )
    others = sorted(set(occurring) - set(VOC_CLASS_NAMES))
    note = f"the folder is called {root.name}, but has other classes than VOC, e.g. {others[0]!r}: " if is_year else ""
    return occurring, [f"{note}its classes are those of its objects"] if note else []


# The cache serves a run, which lists its source twice: for its checks, and to prepare it
@functools.lru_cache(maxsize=1)
def _collect_class_names(root: Path, facts: tuple[FileFacts, ...], is_year: bool) -> tuple[str, ...]:
    """Returns the sorted names of the objects in the files of `facts`.

    A file that cannot be used names none, and its image will be quarantined. `is_year`: the folder is called like VOC,
    so that files with names of VOC's classes only need not be parsed.
    """
    names: set[str] = set()
    for path, size, _ in facts:
        if 0 <= size <= MAX_XML_BYTES:
            with contextlib.suppress(OSError):
                data = LocalFiles(root).read(path)
                tags = set(NAME_TAG.findall(data)) if is_year else set()
                names |= {tag.decode() for tag in tags} if tags and tags <= VOC_NAMES else parse_class_names(data)
    return tuple(sorted(names))


def find_mask_files(root: Path) -> dict[bytes, bytes]:
    """Returns the path of each mask below the root, by the name of its image."""
    folder = os.path.join(os.fsencode(root), VOC_MASKS.encode())
    found: dict[bytes, bytes] = {}
    if not os.path.isdir(folder) or not is_below(os.fsencode(root), folder):
        return found
    names = sorted(os.listdir(folder))
    for ending in MASK_ENDINGS:
        for name in names:
            if name.lower().endswith(ending.encode()):
                found.setdefault(name[: -len(ending)], b"%s/%s" % (VOC_MASKS.encode(), name))
    return found


def read_label_map(root: Path) -> dict[MaskColour, str]:
    """Returns the class of each colour in labelmap.txt; {} if there is no such file.

    Raises:
        UserError: a line is no class and colour, or repeats one.
    """
    file = root / VOC_LABEL_MAP
    found: dict[MaskColour, str] = {}
    for number, line in read_numbered_lines(file) if file.exists() else ():
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        levels = rest.partition(":")[0].split(",")
        if not name or len(levels) != 3 or not all(level.isdecimal() and int(level) < 256 for level in levels):
            raise UserError(f"{file}: line {number}: {line[:80]!r} is not a class and a colour, as in cat:128,0,0::")
        colour = (int(levels[0]), int(levels[1]), int(levels[2]))
        if colour in found or name in found.values():
            raise UserError(f"{file}: line {number}: {line[:80]!r} repeats a class or a colour")
        found[colour] = name
    return found


def is_void_name(name: str) -> bool:
    return name.lower() in LABEL_MAP_VOID


def make_mask_rule(
    classes: tuple[str, ...], mask_values: Mapping[str, tuple[int | str, ...]], label_map: Mapping[MaskColour, str]
) -> ClassMapRule:
    """Returns what the values of masks stand for; `mask_values` is `dataset.mask_values` and counts before `label_map`.

    Raises:
        UserError: a value stands for something that is no class.
    """
    known = {**{name: VOID_VALUE for name in label_map.values() if is_void_name(name)}, VOID_NAME: VOID_VALUE}
    known |= {name: k for k, name in enumerate(classes)}
    for name, where in (
        *((name, "dataset.mask_values") for name in mask_values),
        *((name, VOC_LABEL_MAP) for name in label_map.values()),
    ):
        if name not in known:
            raise UserError(f"{where}: {name!r} is no class; {suggest_valid(name, (*classes, VOID_NAME))}")
    stated = {value: known[name] for name, values in mask_values.items() for value in values}
    numbers = {value: number for value, number in stated.items() if isinstance(value, int)}
    colours = {_parse_colour(value): number for value, number in stated.items() if isinstance(value, str)}
    if not mask_values:
        colours = {colour: known[name] for colour, name in label_map.items()}
    return ClassMapRule(len(classes), numbers, colours)


def _parse_colour(text: str) -> MaskColour:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
