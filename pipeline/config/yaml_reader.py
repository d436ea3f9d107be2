"""Reads YAML with the scalars of YAML 1.2: `1e-3` is a number, `yes` is a text, `010` is ten.

Keys that occur twice and aliases are errors.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from firstlight.pipeline.errors import UserError

MAX_YAML_BYTES = 1_000_000


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's SafeLoader with the scalars of the core schema of YAML 1.2, and without aliases and repeated keys."""

    # A class attribute that PyYAML itself changes.
    yaml_implicit_resolvers: Any = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

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


class _YamlDumper(yaml.SafeDumper):
    """PyYAML's SafeDumper, which also quotes texts that the loader would read as numbers, such as `1e-3`."""


def _construct_int(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: Any, node: Any) -> float:
    return float(loader.construct_scalar(node))


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), ["t", "f"])
for _class in (_YamlLoader, _YamlDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    )
_YamlLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_YamlLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        UserError: the file is missing, too large, not YAML, or not a mapping. The message names the file and the line.
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
    loader = None
    try:
        loader = _YamlLoader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}:{line} {problem}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: Any) -> str:
    """Returns a value of plain JSON types as YAML text, with the keys in their order."""
    return str(yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, width=120, allow_unicode=True))
