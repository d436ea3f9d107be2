"""The failures that are told to the user in one line on stderr, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a file or a machine's set-up: the user's to mend, exit code 2.

    The text is one line (or one line per mistake) that names the dotted key, file or row, the value found, and what would be valid.
    """


class StopTraining(Exception):
    """The training cannot go on and repeating it would not help: exit code 1. Raised by all ranks alike."""


class Stopped(StopTraining):
    """The training was asked to stop: a file `stop` in its folder holds why."""


class Paused(StopTraining):
    """The training has come as far as it was to come for now; its last checkpoint holds it."""


class StageFailed(RuntimeError):
    """The workers failed more often than `scale.max_failures` allows: exit code 1. One line with the rank and its error."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends like Ctrl-C, with its own exit code."""


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` with the nearest known word, else the list of all of them."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    listing = f"valid: {', '.join(names)}"
    return f"did you mean {near[0]!r}? ({listing})" if near else listing
