"""What the readers of published layouts share: the folder, what is missing in it, lists of text, labels within their range."""

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from firstlight.pipeline.data.sources.files import text
from firstlight.pipeline.data.sources.source import local_root
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

SHOWN = 6  # names of what is in a folder, in an error


def home(dataset: "Dataset", *names: str) -> Path:
    """The folder that an archive unpacks to: `dataset.root`, or below it the first of `names` that there is."""
    root = local_root(dataset)
    return next((root / name for name in names if (root / name).is_dir()), root)


def need(folder: Path, *names: str) -> None:
    """All of `names` are there.

    Raises:
        UserError: naming the first that is not, and what there is instead.
    """
    for name in names:
        if not (folder / name).exists():
            raise UserError(
                f"dataset.root: {str(folder / name)!r} is missing; {str(folder)!r} holds {_contents(folder)}"
            )


def _contents(folder: Path) -> str:
    names = sorted(os.fsdecode(name) for name in os.listdir(os.fsencode(folder)))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(map(repr, names[:SHOWN])) or "nothing") + more


def lines(file: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank; bytes that are not UTF-8 are kept as the file system's names keep them."""
    numbered = enumerate(os.fsdecode(file.read_bytes()).split("\n"), 1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def class_names(file: Path) -> tuple[str, ...]:
    """One a line.

    Raises:
        UserError: there is none, or one is listed twice.
    """
    names = tuple(text(os.fsencode(name)) for _, name in lines(file))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(
            f"{file}: must list every class once, one a line; found {f'twice: {twice[0]!r}' if twice else 'none'}"
        )
    return names


def inside(path: str, where: str) -> str:
    """`path` as a list has it: relative, and without a way up.

    Raises:
        UserError: it is not; `where` is the file and line.
    """
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise UserError(f"{where}: {path!r} is no path below dataset.root")
    return "/".join(parts)


def check_labels(file: Path, labels: np.ndarray, low: int, high: int) -> None:
    """`labels` (n,) lie in `low` .. `high`.

    Raises:
        UserError: naming the file and the row, counted from 0.
    """
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if len(wrong):
        raise UserError(f"{file}: row {wrong[0]}: label {labels[wrong[0]]} is out of range; valid: {low} to {high}")
