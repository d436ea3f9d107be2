"""Checks that the readers of published sets share: folders, missing files, lists of text, and labels within a range."""

import os
from pathlib import Path, PurePosixPath

import numpy as np

from firstlight.pipeline.data.sources.files import decode_path
from firstlight.pipeline.data.sources.source import SourceOptions, open_local_root
from firstlight.pipeline.errors import UserError

# The most names of a folder's content in an error
MAX_LISTED_NAMES = 6


def find_unpacked_folder(dataset: SourceOptions, *names: str) -> Path:
    """Returns the folder that an archive unpacks to: the first of `names` below `dataset.root`, else the root."""
    root = open_local_root(dataset)
    return next((root / name for name in names if (root / name).is_dir()), root)


def require_files(folder: Path, *names: str) -> None:
    """Checks that all of `names` exist.

    Raises:
        UserError: one is missing; the message lists the content of the folder.
    """
    for name in names:
        if not (folder / name).exists():
            raise UserError(
                f"dataset.root: {str(folder / name)!r} is missing; {str(folder)!r} holds {_describe_contents(folder)}"
            )


def _describe_contents(folder: Path) -> str:
    names = sorted(os.fsdecode(name) for name in os.listdir(os.fsencode(folder)))
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return (", ".join(map(repr, names[:MAX_LISTED_NAMES])) or "nothing") + more


def read_numbered_lines(file: Path) -> list[tuple[int, str]]:
    """Returns (number from 1, text) of each line that is not blank.

    Bytes that are not UTF-8 become surrogates, as in the names of files.
    """
    numbered = enumerate(os.fsdecode(file.read_bytes()).split("\n"), 1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def read_class_lines(file: Path) -> tuple[str, ...]:
    """Returns the names of classes in a file, one a line.

    Raises:
        UserError: the file is empty, or lists a class twice.
    """
    names = tuple(decode_path(os.fsencode(name)) for _, name in read_numbered_lines(file))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(
            f"{file}: must list every class once, one a line; found {f'twice: {twice[0]!r}' if twice else 'none'}"
        )
    return names


def check_relative_path(path: str, where: str) -> str:
    """Returns `path`, normalised.

    Raises:
        UserError: it is absolute or leads upwards; `where` is the file and line that name it.
    """
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise UserError(f"{where}: {path!r} is no path below dataset.root")
    return "/".join(parts)


def check_labels(file: Path, labels: np.ndarray, low: int, high: int) -> None:
    """Checks that the (n,) `labels` are in `low` to `high`.

    Raises:
        UserError: one is not; the message names the file and the row, counted from 0.
    """
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if len(wrong):
        raise UserError(f"{file}: row {wrong[0]}: label {labels[wrong[0]]} is out of range; valid: {low} to {high}")
