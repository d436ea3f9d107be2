"""Lines that tell how a source was read: files left out, by reason; classes by name; names that look alike."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

MAX_NOTED_NAMES, MAX_LISTED_CLASSES = 5, 20
MAX_SHOWN_CHARACTERS = 60


def show_name(name: str) -> str:
    """Returns a name as it can be shown on one line: without control characters, and shortened."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return plain if len(plain) <= MAX_SHOWN_CHARACTERS else f"{plain[:MAX_SHOWN_CHARACTERS]}..."


def count_things(count: int, thing: str) -> str:
    """Returns `1 image` or `2 images`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def join_names(names: Iterable[str], most: int = MAX_NOTED_NAMES) -> str:
    """Returns up to `most` names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(map(show_name, listed[:most])) + more


def join_counts(counts: Mapping[str, int], most: int = MAX_NOTED_NAMES) -> str:
    """Returns `a 3, b 2`, the largest first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(count for _, count in ordered[most:])
    return ", ".join(f"{show_name(name)} {count:,}" for name, count in ordered[:most]) + (
        f", others {rest:,}" if rest else ""
    )


def describe_read_files(read: int, left_out: Mapping[str, int], what: str = "files") -> str:
    """Returns how many files were read, and how many were left out, by reason."""
    total = sum(left_out.values())
    reasons = f": {join_counts({why: count for why, count in left_out.items() if count}, 8)}" if total else ""
    return f"read {read:,} {what}, left out {total:,}{reasons}"


def fold_name(name: str) -> str:
    """Returns a name without what twins differ in: case, spaces, and how Unicode composes a character."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def find_near_twins(names: Sequence[str]) -> list[list[str]]:
    """Returns the groups of names that are equal when folded."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe_near_twins(classes: Sequence[str], counts: Mapping[int, int]) -> list[str]:
    """Returns a note about classes whose names are nearly the same. `counts`: the images of each class number."""
    twins = find_near_twins(classes)
    if not twins:
        return []
    numbers = {name: k for k, name in enumerate(classes)}
    shown = "; ".join(
        " and ".join(f"{show_name(name)!r} ({counts.get(numbers[name], 0):,})" for name in group)
        for group in twins[:MAX_NOTED_NAMES]
    )
    more = f" and {len(twins) - MAX_NOTED_NAMES:,} more" if len(twins) > MAX_NOTED_NAMES else ""
    return [f"classes that look alike are kept apart: {shown}{more}; dataset.label_case=lower reads each as one"]


def describe_classes(classes: Sequence[str], labels: np.ndarray, rows: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the classes by name, with their numbers of training images."""
    if not classes:
        return ["no labels"]
    counts = count_labels(labels, rows.get("train"))
    listed = [f"{show_name(name)} {counts.get(k, 0):,}" for k, name in enumerate(classes[:MAX_LISTED_CLASSES])]
    more = len(classes) - len(listed)
    return [
        f"classes, {len(classes):,} with their training images: {', '.join(listed)}"
        + (f" and {more:,} more" if more else "")
    ]


def describe_absent_classes(classes: Sequence[str], labels: np.ndarray, rows: Mapping[str, np.ndarray]) -> list[str]:
    """Returns notes about classes without any image, without one to train on, and without one to test on."""
    if not classes:
        return []
    parts = {split: count_labels(labels, indices) for split, indices in rows.items()}
    everywhere: Counter[int] = sum(parts.values(), Counter())
    notes = []
    if none := [name for k, name in enumerate(classes) if k not in everywhere]:
        notes.append(f"classes without an image: {join_names(none)}")
    for split, what in (("train", "to train on"), ("test", "to test on")):
        found = parts.get(split)
        missing = [name for k, name in enumerate(classes) if found and k in everywhere and k not in found]
        if missing:
            notes.append(f"classes without an image {what}: {join_names(missing)}")
    return notes


def drop_refused(rows: Mapping[str, np.ndarray], refused: Iterable[int]) -> dict[str, np.ndarray]:
    """Returns the rows of each split without those that are known to hold no image, for counts."""
    wrong = np.array(sorted(refused), np.int64)
    return {split: np.setdiff1d(indices, wrong, assume_unique=True) for split, indices in rows.items()}


def count_labels(labels: np.ndarray, indices: np.ndarray | None = None) -> Counter[int]:
    """Returns the number of images of each class; those without a label are not counted."""
    known = labels if indices is None else labels[indices]
    values, counts = np.unique(known[known >= 0], return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
