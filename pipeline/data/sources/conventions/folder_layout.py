"""The layout of a folder of images: folders that stand for splits and for classes, and folders that wrap others."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from firstlight.pipeline.data.sources.conventions.reading import count_things, fold_name, join_names, show_name
from firstlight.pipeline.data.sources.conventions.split_names import (
    SPLITS,
    describe_split_names,
    find_split_names,
    list_words,
    parse_split_name,
    require_distinct_splits,
)
from firstlight.pipeline.errors import UserError

# Folders that systems and programs leave behind; hidden ones are left out, too
SYSTEM_FOLDERS = {
    *("__macosx", "$recycle.bin", "recycler", "lost+found", "__pycache__", "system volume information", "found.000"),
    *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "network trash folder", "temporary items"),
}
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"}
# Folders of this name hold the images of a folder above them; beside them are folders of annotations
IMAGE_FOLDERS = {
    *("images", "image", "imgs", "img", "jpegimages", "jpeg", "jpg", "png", "rgb", "data", "raw", "frames"),
    *("photos", "photo", "pictures", "picture", "pics", "all"),
}
ANNOTATION_FOLDERS = {
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "ann", "gt", "groundtruth", "depth"),
    *("seg", "segmentation", "segmentations", "segmentationclass", "segmentationobject", "depths", "thumbnails"),
    *("thumbs", "previews"),
}
UNLABELLED_FOLDERS = {"unlabeled", "unlabelled", "nolabel", "nolabels", "unsupervised"}
# Folders, each by its names below the root; `*` stands for any name, which is then the class
FolderPattern = tuple[bytes, ...]
ShowFolder = Callable[[bytes], str]
SETTLING_KEY = "dataset.splits"


@dataclass
class FolderNode:
    """A folder with images at any depth below it."""

    # The number of images directly in it
    images: int = 0
    # The folders in it that have images
    children: dict[bytes, "FolderNode"] = field(default_factory=dict)

    @property
    def is_flat(self) -> bool:
        return self.images > 0 and not self.children

    @property
    def is_nested(self) -> bool:
        return self.images == 0 and bool(self.children)

    def count_images(self) -> int:
        return self.images + sum(child.count_images() for child in self.children.values())


def build_folder_tree(folders: Mapping[bytes, int]) -> FolderNode:
    """Returns the tree of the folders that hold images. `folders`: path -> number of images directly in it."""
    root = FolderNode()
    for path, count in folders.items():
        node = root
        for name in path.split(b"/") if path else ():
            node = node.children.setdefault(name, FolderNode())
        node.images += count
    return root


@dataclass
class FolderPlan:
    """The folders of each split, and notes about them."""

    patterns: dict[str, list[FolderPattern]]
    reading: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def place_folder(self, path: bytes) -> tuple[str | None, bytes]:
        """Returns the split of the images of a folder, None if they belong to none, and their class, b"" if none.

        The pattern with the most names counts among several, as test does besides `*`.
        """
        parts = tuple(path.split(b"/")) if path else ()
        ranked = [
            (sum(not _is_wildcard(part) for part in pattern), len(pattern), split, pattern)
            for split, patterns in self.patterns.items()
            for pattern in patterns
            if _matches_start(parts, pattern)
        ]
        if not ranked:
            return None, b""
        *_, split, pattern = max(ranked)
        matched = [part for part, wanted in zip(parts, pattern, strict=False) if _is_wildcard(wanted)]
        return split, (*matched, *parts[len(pattern) :], b"")[0]

    def name_outsider(self, path: bytes) -> bytes:
        """Returns what a file outside of the splits is listed by: itself, or the folder beside the splits it is in."""
        parts = tuple(path.split(b"/"))
        for depth in range(1, len(parts)):
            here = parts[:depth]
            patterns = [pattern for patterns in self.patterns.values() for pattern in patterns]
            if not any(len(pattern) > depth and _matches_start(here, pattern[:depth]) for pattern in patterns):
                return b"/".join(here)
        return path


def _is_wildcard(part: bytes) -> bool:
    return any(sign in part for sign in (b"*", b"?", b"["))


def _matches_start(parts: Sequence[bytes], pattern: FolderPattern) -> bool:
    return len(parts) >= len(pattern) and all(
        fnmatch.fnmatchcase(part, wanted) if _is_wildcard(wanted) else part == wanted
        for part, wanted in zip(parts, pattern, strict=False)
    )


def _find_nodes(tree: FolderNode, pattern: FolderPattern) -> list[FolderNode]:
    nodes = [tree]
    for wanted in pattern:
        nodes = [child for node in nodes for name, child in node.children.items() if _matches_start((name,), (wanted,))]
    return nodes


def plan_given_splits(
    tree: FolderNode, splits: Mapping[str, Sequence[str]], encode: Callable[[str], bytes], show: ShowFolder
) -> FolderPlan:
    """Returns the plan of `dataset.splits`: for each split the paths of folders below the root.

    Raises:
        UserError: no image lies in a folder that is given, or none is given for training.
    """
    plan = FolderPlan({} if splits else {"train": [()]})
    for split, names in splits.items():
        plan.patterns[split] = [
            tuple(part for part in encode(name).split(b"/") if part not in (b"", b".")) for name in names
        ]
        for name, pattern in zip(names, plan.patterns[split], strict=True):
            if not _find_nodes(tree, pattern):
                valid = join_names(map(show, sorted(tree.children)), 20) or "none"
                raise UserError(f"{SETTLING_KEY}.{split}: no images in {name!r}; folders with images: {valid}")
    if "train" not in plan.patterns:
        raise UserError(f"{SETTLING_KEY}: names no folder to train on; valid: e.g. {{train: a, test: b}}")
    if splits:
        given = {name: split for split, names in splits.items() for name in names}
        plan.reading.append(describe_split_names(given, " (dataset.splits)"))
    return plan


def find_layout(tree: FolderNode, show: ShowFolder) -> FolderPlan:
    """Finds the folders of the splits by their names, through folders that wrap others.

    Raises:
        UserError: it cannot be told whether a folder is a split or a class; one line with the key that settles it.
    """
    plan = FolderPlan({})
    prefix = _look_through(tree, (), plan, show)
    level = _FolderLevel(_find_nodes(tree, prefix)[0], prefix, show)
    _check_numbered_splits(level)
    if level.splits and _are_split_folders(level, plan):
        require_distinct_splits(level.splits, _show_path(prefix, show) or "the root")
        placed = {_show_path(level.path_of(name), show): split for name, split in level.splits.items()}
        paths = {split: level.path_of(name) for name, split in level.splits.items()}
        if "train" not in paths:
            paths["train"] = (*prefix, b"*") if level.others else prefix
            placed[f"the other {'folders' if level.others else 'images'}"] = "train"
        plan.reading.append(describe_split_names(placed))
        plan.patterns = {split: [_look_through(tree, paths[split], plan, show)] for split in SPLITS if split in paths}
    elif level.splits and len(level.names) == 1 and not level.node.images:
        plan.patterns = {"train": [_look_through(tree, level.path_of(next(iter(level.names))), plan, show)]}
    else:
        plan.patterns = _find_splits_below_classes(level, plan) or {"train": [prefix]}
    return plan


class _FolderLevel:
    """The folders at one place, those with names of splits and the others."""

    def __init__(self, node: FolderNode, prefix: FolderPattern, show: ShowFolder) -> None:
        self.node, self.prefix, self.show = node, prefix, show
        self.names = {show(name): name for name in sorted(node.children)}
        self.splits = find_split_names(self.names)
        self.others = [name for name in self.names if name not in self.splits]

    def path_of(self, name: str) -> FolderPattern:
        return (*self.prefix, self.names[name])

    def node_of(self, name: str) -> FolderNode:
        return self.node.children[self.names[name]]


def _show_path(path: FolderPattern, show: ShowFolder) -> str:
    return "/".join(map(show, path))


def _look_through(tree: FolderNode, path: FolderPattern, plan: FolderPlan, show: ShowFolder) -> FolderPattern:
    """Returns the folder below `path` that holds splits, classes or images, if the folders above it only wrap it.

    A folder wraps the only one within it if that one holds folders and is no split, or is called `images` or as itself.
    Folders of masks and labels beside `images` are left out.
    """
    start, nodes = path, _find_nodes(tree, path)
    node = nodes[0]
    while len(nodes) == 1 and node.is_nested:
        inner = [name for name in node.children if _has_word_of(show(name), IMAGE_FOLDERS)]
        aside = sorted(name for name in node.children if name not in inner)
        if len(inner) == 1 and aside and all(_has_word_of(show(name), ANNOTATION_FOLDERS) for name in aside):
            files = sum(node.children[name].count_images() for name in aside)
            seen = f"{join_names(map(show, aside))} ({count_things(files, 'image')})"
            plan.notes.append(
                f"left out, as it stands beside {_show_path((*path, inner[0]), show)}: {seen}; "
                f"{SETTLING_KEY}={{}} reads all as classes"
            )
        elif len(node.children) != 1:
            break
        name = inner[0] if inner else aside[0]
        is_split = bool(find_split_names([show(name)])) and path == start == ()
        # seg_train/seg_train, as archives of that name unpack
        is_repeated = bool(path) and fold_name(show(name)) == fold_name(show(path[-1]))
        if is_split or not (inner or is_repeated or node.children[name].is_nested):
            break
        path, node = (*path, name), node.children[name]
    if path != start:
        where = _show_path(start, show) or "the root"
        plan.reading.append(f"the images of {where} are all in {_show_path(path, show)}, which is looked through")
    return path


def _has_word_of(name: str, words: set[str]) -> bool:
    return "".join(list_words(name)) in words


def _are_split_folders(level: _FolderLevel, plan: FolderPlan) -> bool:
    """Returns True if the folders with names of splits are splits, and False if they are classes.

    Raises:
        UserError: it cannot be told.
    """
    node, others = level.node, level.others
    if "train" not in level.splits.values():
        return _are_only_evaluated(level, plan)
    if len(level.splits) > 1 or not (others or node.images):
        return True
    (train,) = level.splits
    if level.node_of(train).is_nested and not any(level.node_of(name).children for name in others):
        return True
    are_flat = all(level.node_of(name).is_flat for name in level.names)
    if are_flat and len(others) > 1 and not node.images:
        plan.notes.append(
            f"{show_name(train)} is read as a class, as it stands beside {join_names(others)}, and no folder is there "
            f"to test on; {SETTLING_KEY}={{train: {train}}} reads it as the training split"
        )
        return False
    beside = join_names(others) or "images"
    raise UserError(
        f"dataset.root: the folder {train!r} stands beside {beside}: the training split, or a class? "
        f"valid: {SETTLING_KEY}={{train: {train}}} (the split), or {SETTLING_KEY}={{}} (a class)"
    )


def _are_only_evaluated(level: _FolderLevel, plan: FolderPlan) -> bool:
    """Decides where no folder is named for training, as `_are_split_folders`."""
    node, splits, others = level.node, level.splits, level.others
    if not others and len(splits) == 1 and not node.images:
        (name,) = splits
        plan.notes.append(f"all images are in {show_name(name)}, so they are trained on")
        return False
    if not others and node.images and len(splits) == len(set(splits.values())):
        return True
    inner = {fold_name(level.show(name)) for split in splits for name in level.node_of(split).children}
    are_nested = all(level.node_of(split).is_nested for split in splits)
    # test/cat beside cat and dog: the classes stand in both
    if others and not node.images and are_nested and inner <= set(map(fold_name, others)):
        return True
    first = next(iter(splits))
    if not others:
        raise UserError(
            f"dataset.root: folders {join_names(splits)}, and none to train on; "
            f"valid: a folder train, or {SETTLING_KEY}={{train: a, test: b}} with the names of folders"
        )
    # train_clean and train_noisy beside test
    parts = [name for name in others if (found := parse_split_name(name)) and found.split == "train"]
    train = f"[{', '.join(parts)}]" if parts else "'*'"
    raise UserError(
        f"dataset.root: the folder {first!r} stands beside {join_names(others)}: a split, or a class? valid: "
        f"{SETTLING_KEY}={{train: {train}, {splits[first]}: {first}}} (a split), or {SETTLING_KEY}={{}} (a class)"
    )


def _check_numbered_splits(level: _FolderLevel) -> None:
    """Raises UserError if all folders are numbered parts of splits, as train_1 and train_2, or trainA and testB."""
    parts = {name: parse_split_name(name) for name in level.others}
    numbered = [name for name, found in parts.items() if found and all(len(w) == 1 or w.isdigit() for w in found.rest)]
    if len(numbered) > 1 and len(numbered) == len(level.others):
        raise UserError(
            f"dataset.root: {join_names(level.names)}: parts of splits, or classes? valid: {SETTLING_KEY}={{train: "
            f"[{numbered[0]}, ...]}} (splits), or {SETTLING_KEY}={{}} (classes)"
        )


def _find_splits_below_classes(level: _FolderLevel, plan: FolderPlan) -> dict[str, list[FolderPattern]]:
    """Returns the patterns of <class>/train and <class>/test; {} if the classes hold no such folders.

    Raises:
        UserError: only some classes hold them.
    """
    inner = [_FolderLevel(child, level.path_of(name), level.show) for name, child in _named_children(level)]
    found = {word: split for one in inner for word, split in one.splits.items()}
    is_whole = len(inner) > 1 and not level.node.images and all(one.node.is_nested and not one.others for one in inner)
    if is_whole and "train" in found.values():
        plan.reading.append(describe_split_names({f"<class>/{word}": split for word, split in found.items()}))
        raw = {word: one.names[word] for one in inner for word in one.splits}
        return {
            split: [(*level.prefix, b"*", raw[word]) for word, own in found.items() if own == split]
            for split in SPLITS
            if split in found.values()
        }
    for one in inner:
        if len(set(one.splits.values())) > 1:
            example = ", ".join(f"{split}: '*/{name}'" for name, split in reversed(one.splits.items()))
            raise UserError(
                f"dataset.root: {_show_path(one.prefix, level.show)!r} holds {join_names(one.names)}: splits, or parts "
                f"of a class? valid: {SETTLING_KEY}={{{example}}} (splits), or {SETTLING_KEY}={{}} (parts of a class)"
            )
    return {}


def _named_children(level: _FolderLevel) -> list[tuple[str, FolderNode]]:
    return [(name, level.node_of(name)) for name in level.names]
