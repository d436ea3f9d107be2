"""YAML files: the scalars of YAML 1.2, and one line for each wrong file."""

import time
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.terminal import escape_text


@pytest.mark.fault(45, "a key that stands twice")
@pytest.mark.fault(46, "!!python and aliases")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2 the key 'name' occurs twice"),
        ("name: [a\n", "expected ',' or ']'"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("1: a\n", "the key '1' must be a text"),
        ("", "must be a mapping"),
        ("a: " + "[" * 300 + "]" * 300, "line 1 more than 64 levels are not allowed"),
        ("\n".join("  " * k + "a:" for k in range(240)), "line 64 more than 64 levels are not allowed"),
        ('b: 1\na: "x\\ud800"', "line 2 'x\\ud800' has half of a surrogate pair"),
        ('"\\udfff": 1', "line 1 '\\udfff' has half of a surrogate pair"),
        ("a: 18446744073709551616", f"line 1 18446744073709551616 is not valid: integers are at most {2**63 - 1}"),
        ("a: " + "9" * 5000, f"line 1 {'9' * 30} is not valid: integers are at most {2**63 - 1}"),
        ("a: \x1b[2J", "unacceptable character #x001b"),
    ],
)
def test_wrong_file_is_one_line_with_file_and_reason(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        yaml_reader.read_yaml(file)
    assert len(str(caught.value).splitlines()) == 1
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        yaml_reader.read_yaml(tmp_path / "none.yaml")


@pytest.mark.fault(45, "1e-3, 010, yes, 12:30")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2.5e+1", -25.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("010", 10),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("~", None),
        ("true", True),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = yaml_reader.parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_dumped_yaml_is_read_as_the_same_value_and_type() -> None:
    value = {"b": "yes", "a": ["010", 1e-3, 10, None, True, "1e-3"], "c": {"d": []}}
    text = yaml_reader.dump_yaml(value)
    assert yaml_reader.parse_yaml(text, "x") == value
    assert text.index("b:") < text.index("a:")


def test_file_larger_than_the_limit_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text("a: " + "x" * yaml_reader.MAX_YAML_BYTES)
    with pytest.raises(UserError, match=r"large\.yaml: is larger than 1000000 bytes"):
        yaml_reader.read_yaml(file)


@pytest.mark.fault(46, "a list of a million bytes")
@pytest.mark.parametrize(
    "text", ["a: [" + "0, " * 300_000 + "0]", "a:\n" + "- x\n" * 240_000, "a: {" + "b: 0, " * 150_000 + "}"]
)
def test_many_values_are_one_line_in_time(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    read, compose = list[None](), yaml_reader._YamlLoader.compose_node

    def compose_counted(*arguments: Any) -> Any:
        read.append(None)
        return compose(*arguments)

    monkeypatch.setattr(yaml_reader._YamlLoader, "compose_node", compose_counted)
    started = time.process_time()
    with pytest.raises(UserError, match=r"^f\.yaml: line \d+ more than 20,000 values and keys are not allowed$"):
        yaml_reader.parse_yaml(text, "f.yaml")
    assert len(read) == yaml_reader.MAX_YAML_NODES + 1, "what follows the limit is not read"
    # It takes less than a second where nothing else runs.
    assert time.process_time() - started < 20


@pytest.mark.parametrize("text", ["a\u202eb", "\x1b[2J", "\u200b", "\u2028", "ü"])
def test_dumped_yaml_has_no_control_characters(text: str) -> None:
    dumped = yaml_reader.dump_yaml({"a": text, "ü": [text]})
    assert escape_text(dumped) == dumped
    assert yaml_reader.parse_yaml(dumped, "x") == {"a": text, "ü": [text]}
    assert "ü" in dumped or text != "ü"
