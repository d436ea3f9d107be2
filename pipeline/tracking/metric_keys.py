"""Keys of metrics and tags that MLflow accepts: letters, digits, `_`, `-`, `.`, `:`, `/` and spaces."""

import re
from collections.abc import Sequence

REFUSED_CHARACTERS = re.compile(r"[^\w\-.: /]")
REFUSED_IN_PART = re.compile(r"[^\w .:-]")
# The most characters of a class's name in a key; MLflow accepts 250 characters in all.
MAX_PART_LENGTH = 100
# The metric of a stage's run that has the seconds of its work.
SECONDS_METRIC = "seconds"


def sanitize_metric_key(name: str) -> str:
    """Returns `name` with `_at_` for `@`, and without the other characters that MLflow refuses."""
    return remove_refused_characters(name.replace("@", "_at_"))


def remove_refused_characters(name: str) -> str:
    """Returns `name` without the characters that MLflow refuses."""
    return REFUSED_CHARACTERS.sub("", name)


def unique_key_parts(names: Sequence[str]) -> list[str]:
    """Returns a different part of a metric key for each name, such as the name of a class.

    Refused characters and `/` become `_`. A part that is empty, longer than MAX_PART_LENGTH, made of dots, or equal to
    another one gets the position of its name as suffix.
    """
    keys: list[str] = []
    for position, name in enumerate(names):
        key = REFUSED_IN_PART.sub("_", name)
        if not key.strip(".") or len(key) > MAX_PART_LENGTH or (key != name and key in {*keys, *names}):
            key = f"{key[:MAX_PART_LENGTH].strip('.') or 'class'} {position}"
        keys.append(key)
    return keys
