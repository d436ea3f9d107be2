"""Reads YAML with the scalars of YAML 1.2: `1e-3` is a number, `yes` is a text, `010` is ten.

Keys that occur twice and aliases are errors.
"""

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from firstlight.pipeline.errors import UserError, one_line, take_first_line
from firstlight.pipeline.terminal import UNSAFE_CHARACTERS

MAX_YAML_BYTES = 1_000_000
# Values and keys of a file, which are read in seconds, and levels of nesting.
MAX_YAML_NODES, MAX_YAML_DEPTH = 20_000, 64
LARGEST_INTEGER = 2**63 - 1


# Halves of pairs that stand for one character in UTF-16. Alone they are no characters, and no file can hold them.
HALF_PAIR = re.compile("[\ud800-\udfff]")


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's SafeLoader with the scalars of the core schema of YAML 1.2, and without aliases and repeated keys."""

    # A class attribute that PyYAML itself changes.
    yaml_implicit_resolvers: Any = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.num_nodes = self.level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem_at(event, "aliases (*name) are not allowed")
        self.num_nodes += 1
        self.level += 1
        if self.num_nodes > MAX_YAML_NODES:
            raise _problem_at(event, f"more than {MAX_YAML_NODES:,} values and keys are not allowed")
        if self.level > MAX_YAML_DEPTH:
            raise _problem_at(event, f"more than {MAX_YAML_DEPTH} levels are not allowed")
        if isinstance(event, yaml.ScalarEvent) and HALF_PAIR.search(event.value):
            raise _problem_at(event, f"{event.value!a} has half of a surrogate pair, which is no character")
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(None, None, f"the key {name!r} must be a text", key.start_mark)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {name!r} occurs twice", key.start_mark)
            seen.add(name)
        return dict(super().construct_mapping(node, deep=deep))


def _problem_at(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, place.start_mark)


class _YamlDumper(yaml.SafeDumper):
    """PyYAML's SafeDumper, which also quotes texts that the loader would read as numbers, such as `1e-3`."""


def _construct_int(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    if len(text) > len(str(LARGEST_INTEGER)) + 1 or abs(int(text)) > LARGEST_INTEGER:
        raise _problem_at(node, f"{text[:30]} is not valid: integers are at most {LARGEST_INTEGER}")
    return int(text)


def _construct_float(loader: Any, node: Any) -> float:
    return float(loader.construct_scalar(node))


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)\Z"), ["n", "~", ""])
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)\Z"), ["t", "f"])
for _class in (_YamlLoader, _YamlDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+\Z"), list("-+0123456789"))
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
        list("-+.0123456789"),
    )
_YamlLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_YamlLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        UserError: the file is missing, too large, too deep, not YAML, or not a mapping. The message names the file and
            the line.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"{path}: is larger than {MAX_YAML_BYTES} bytes")
        text = path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    value = parse_yaml(text, where=str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, found {type(value).__name__}")
    return value


def parse_yaml(text: str, where: str) -> Any:
    """Returns the value of a YAML text.

    Raises:
        UserError: the text is not valid. The message begins with `where` and names the line.
    """
    try:
        return copy.deepcopy(_load_text(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or take_first_line(error)
        raise UserError(f"{where}:{line} {problem}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {one_line(error)}") from None


# The cache is one of texts, because the files of a recipe are read again for each trial of a search.
@lru_cache(maxsize=1024)
def _load_text(text: str) -> Any:
    loader = _YamlLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """Returns a value of plain JSON types as YAML text, with the keys in their order.

    If a text has characters that are not shown as themselves, all characters beyond ASCII become escapes.
    """
    text = str(yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, width=120, allow_unicode=True))
    if UNSAFE_CHARACTERS.search(text):
        text = str(yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, width=120, allow_unicode=False))
    return text
