"""Names of splits, as folders, files and columns have them: train2017, Test, valid, seg_train, mnist-train-00.tar."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from firstlight.pipeline.errors import UserError

SPLITS = ("train", "val", "test")
# The names of the splits in notes
SPLIT_TITLES = {"train": "training", "val": "held-out", "test": "test"}
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    # The test split if no other name stands for it, else the held-out part
    **dict.fromkeys(("eval", "evaluation", "holdout", "heldout"), "eval"),
}
# Words that stand beside the word of a split and change nothing
NOISE_WORDS = {
    *("set", "sets", "data", "dataset", "split", "splits", "part", "folder", "dir", "subset", "samples", "examples"),
    *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "pics", "frames"),
    *("jpg", "jpeg", "png", "final", "new", "labeled", "labelled"),
}
# Written as one word: trainset, testimages
GLUED_ENDINGS = ("sets", "set", "data", "dataset", "images", "imgs", "img", "split", "folder")
YEAR_WORD = re.compile(r"(?:19|20)\d\d\Z", re.ASCII)
WORD_BREAK = re.compile(r"[\W_]+|(?<=[a-z])(?=[A-Z])|(?<=[^\W\d])(?=\d)|(?<=\d)(?=[^\W\d])")


class SplitName(NamedTuple):
    """A name that has the word of one split. `rest` are its other words, without those that change nothing."""

    # One of SPLITS, or `eval`
    split: str
    rest: tuple[str, ...]


def list_words(name: str) -> list[str]:
    """Returns the words of a name in lower case; a number is a word."""
    return [word.lower() for word in WORD_BREAK.split(name) if word]


def _find_word(word: str) -> str | None:
    for ending in ("", *GLUED_ENDINGS):
        split = SPLIT_WORDS.get(word.removesuffix(ending)) if word.endswith(ending) else None
        if split is not None:
            return split
    return None


def parse_split_name(name: str) -> SplitName | None:
    """Returns the split that a name has the word of; None if it has none, or words of two splits."""
    words = list_words(name)
    # tRaIn, where changes of case are no ends of words
    if not any(map(_find_word, words)):
        words = list_words(name.lower())
    # hold_out, held-out
    if words[:2] in (["hold", "out"], ["held", "out"]):
        words = ["holdout", *words[2:]]
    found = [_find_word(word) for word in words]
    if len([split for split in found if split]) != 1:
        return None
    split = next(split for split in found if split)
    rest = [
        word
        for word, own in zip(words, found, strict=True)
        if own is None and word not in NOISE_WORDS and not YEAR_WORD.match(word)
    ]
    return SplitName(split, tuple(rest))


def find_split_names(names: Iterable[str]) -> dict[str, str]:
    """Returns name -> split of those names of one place that stand for a split.

    A name with other words besides, such as seg_train, counts only if a name of another split has the same words: a
    class crash_test beside other classes is no split.
    """
    parsed = {name: found for name in names if (found := parse_split_name(name))}
    kinds: dict[tuple[str, ...], set[str]] = {}
    for found in parsed.values():
        kinds.setdefault(found.rest, set()).add(found.split)
    kept = {name: found.split for name, found in parsed.items() if not found.rest or len(kinds[found.rest]) > 1}
    return _settle_eval(kept)


def _settle_eval(found: Mapping[str, str]) -> dict[str, str]:
    stands_for = "val" if "test" in found.values() else "test"
    return {name: stands_for if split == "eval" else split for name, split in found.items()}


def find_file_splits(names: Sequence[str]) -> dict[str, str]:
    """Returns name -> split of files such as train-00000-of-00003.parquet, imagenet-val-07.tar or test/0.tar.

    The words of folders and of the file count, except those that all names share.

    Raises:
        ValueError: a name has words of two splits; the text is the name.
    """
    words = {name: set(map(_find_word, list_words(name))) - {None} for name in names}
    if any(len(found) > 1 for found in words.values()):
        shared = set.intersection(*words.values())
        words = {name: found - shared for name, found in words.items()}
    unclear = next((name for name, found in words.items() if len(found) > 1), None)
    if unclear is not None:
        raise ValueError(unclear)
    return _settle_eval({name: str(next(iter(found))) for name, found in words.items() if found})


def find_value_splits(values: Iterable[str]) -> dict[str, str]:
    """Returns value -> split of those values of a column that name a split: Test, valid, training set."""
    parsed = {value: found.split for value in values if (found := parse_split_name(value)) and not found.rest}
    return _settle_eval(parsed)


def describe_split_names(found: Mapping[str, str], what: str = "") -> str:
    """Returns `splits: train = Train, test = Test`, with what the names are in `what`; at most five names a split."""
    parts = []
    for split in SPLITS:
        names = [name for name, own in found.items() if own == split]
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            parts.append(f"{SPLIT_TITLES[split]} = {', '.join(names[:5])}{more}")
    return f"splits{what}: {'; '.join(parts)}"


def require_distinct_splits(found: Mapping[str, str], where: str) -> None:
    """Checks that at most one name stands for each split, as with folders train2014 and train2017 nobody knows which.

    Raises:
        UserError: names the key that settles it. `where` is the place of the names.
    """
    for split in SPLITS:
        names = [name for name, own in found.items() if own == split]
        if len(names) > 1:
            raise UserError(
                f"dataset.root: {', '.join(map(repr, names))} in {where} all name the {SPLIT_TITLES[split]} split; "
                f"valid: dataset.splits={{{split}: [{', '.join(names)}], ...}} reads them all, or only those it lists"
            )
