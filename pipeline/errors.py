"""Failures that reach the user as one line on stderr, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct in a config, a file or a machine's set-up: exit code 2.

    The text is one line, or one line for each mistake. A line names the dotted key, file or row, the value found, and
    the valid values.
    """


class StopTraining(Exception):
    """The training cannot continue, and repeating it would not help: exit code 1. All ranks raise it alike."""


class Stopped(StopTraining):
    """The training was asked to stop: the file `stop` in its folder holds the reason."""


class Paused(StopTraining):
    """The training reached the end of its segment; its last checkpoint holds the state."""


class StageFailed(RuntimeError):
    """The workers failed more often than `scale.max_failures` allows: exit code 1. The text is one line with the rank
    and its error.
    """


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM: it ends as after Ctrl-C, with an exit code of its own."""


def suggest_valid(word: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'? (valid: ...)` with the nearest known word, or only the list of valid words."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    listing = f"valid: {', '.join(names)}"
    return f"did you mean {near[0]!r}? ({listing})" if near else listing


def one_line(error: BaseException | str, limit: int | None = 200) -> str:
    """Returns the text of an error on one line of at most `limit` characters; None is any number."""
    return " ".join(str(error).split())[:limit]


def take_first_line(error: BaseException) -> str:
    """Returns the first line of the text of an error that has further ones, "" if it has no text."""
    return next(iter(str(error).strip().splitlines()), "")


def describe_os_error(error: BaseException, limit: int | None = 200) -> str:
    """Returns what the operating system calls an error, without a file's name; of other errors the text on one line."""
    return str(getattr(error, "strerror", None) or one_line(error, limit))
