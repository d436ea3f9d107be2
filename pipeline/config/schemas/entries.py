"""The parameters of everything that a recipe can name: methods, tasks and encoders.

They are read from the classes themselves, which takes the seconds of importing torch, and are then kept for as long as
no file of `tasks` changes. So a recipe is checked without torch.
"""

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from firstlight.pipeline import ROOT
from firstlight.pipeline.code_cache import hash_sources, read_cached, write_cached
from firstlight.pipeline.config.docstrings import parse_parameter_meanings
from firstlight.pipeline.config.schemas.parameter_types import encode_type
from firstlight.tasks.extensions.registry import hash_extensions

# The name of the type of a parameter that is the section of a network.
NETWORK_TYPE = "network"
PARAMETERS_CACHE = "parameters"
# The module that reads the meanings of parameters.
DOCSTRINGS = ROOT / "pipeline/config/docstrings.py"
# The attributes of an entry's class that sections know besides its parameters.
METHOD_FACTS = ("image_metrics", "reported_metrics", "keeps_crops")
TASK_FACTS = ("measure",)
# The facts of entries by group and name: {"text": docstring, "parameters": {name: {"type", "meaning", "default"}},
# "facts": {name: value}}. A parameter without "default" is required. All values are JSON.
Entries = dict[str, dict[str, dict[str, Any]]]


@cache
def load_entries() -> Entries:
    """Returns the entries of the groups `methods`, `tasks` and `encoders`, and the parameters that all encoders have
    as the only entry of `shared`.

    Raises:
        TypeError: a parameter has a type that a key of a recipe cannot have.
    """
    if _has_torch():
        return describe_registries()
    sources = [*(ROOT / "tasks").rglob("*.py"), *Path(__file__).parent.glob("*.py"), DOCSTRINGS]
    key = hash_sources(sources, hash_extensions())
    found = read_cached(PARAMETERS_CACHE, key)
    if found is None:
        found = describe_registries()
        write_cached(PARAMETERS_CACHE, key, found)
    return found


def _has_torch() -> bool:
    """Returns True if this process has imported torch, so that the registries cost nothing more."""
    return "torch" in sys.modules


def read_fact(group: str, name: str, fact: str) -> Any:
    """Returns what sections know of an entry besides its parameters, with tuples for lists."""
    value = load_entries()[group][name]["facts"][fact]
    return tuple(value) if isinstance(value, list) else value


def describe_registries() -> Entries:
    """Returns the entries as the registries of `tasks` have them."""
    from firstlight.tasks.downstream import TASKS
    from firstlight.tasks.nn.encoders import ENCODERS, NetworkSection
    from firstlight.tasks.nn.input_normalization import InputNormalization, SharedEncoderOptions
    from firstlight.tasks.pretrain import METHODS

    named = {NetworkSection: NETWORK_TYPE}
    documented = (*SharedEncoderOptions.__mro__[:-1], *InputNormalization.__mro__[:-1])
    shared = _describe_parameters(SharedEncoderOptions.__init__, named, documented)
    entries = {
        "methods": describe_registry(METHODS, named, METHOD_FACTS),
        "tasks": describe_registry(TASKS, named, TASK_FACTS),
        "encoders": describe_registry(ENCODERS, named),
        "shared": {"shared": {"text": None, "parameters": shared, "facts": {}}},
    }
    # The entries pass through JSON, which has lists for tuples, so that they are the same as when they are read.
    found: Entries = json.loads(json.dumps(entries))
    return found


def describe_registry(
    registry: Mapping[str, Callable[..., Any]], named: Mapping[Any, str], facts: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """Returns the entries of a registry of functions and classes.

    `named`: types besides those of `encode_type`, by their names. `facts`: attributes that each class has.
    """
    return {
        name: {
            "text": entry.__doc__,
            "parameters": _describe_registered(entry, named),
            "facts": {fact: getattr(entry, fact) for fact in facts},
        }
        for name, entry in registry.items()
    }


def _describe_registered(entry: Callable[..., Any], named: Mapping[Any, str]) -> dict[str, Any]:
    """Returns the parameters of a function, or of the constructor of a class."""
    if isinstance(entry, type):
        constructor = entry.__init__  # type: ignore[misc]
        return _describe_parameters(constructor, named, (constructor, *entry.__mro__[:-1]))
    return _describe_parameters(entry, named, (entry,))


def _describe_parameters(
    function: Callable[..., Any], named: Mapping[Any, str], documented: Sequence[Any]
) -> dict[str, Any]:
    """Returns the keyword-only parameters of `function`, with meanings from the docstrings."""
    hints = get_type_hints(function, include_extras=True)
    keyword_only = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    docstrings = [inspect.unwrap(source).__doc__ for source in documented]
    meanings = parse_parameter_meanings(docstrings, [p.name for p in keyword_only])
    found = {}
    for p in keyword_only:
        try:
            described = {"type": encode_type(hints[p.name], named)}
        except TypeError as error:
            raise TypeError(f"{function.__qualname__}: {p.name}: {error}") from None
        described["meaning"] = meanings.get(p.name)
        found[p.name] = described if p.default is p.empty else {**described, "default": p.default}
    return found
