"""Records: JSON files that are read back and trusted. Their shape is checked and, if they are sealed, their sum.

A sealed record holds the sha256 of its other keys, so that a changed bit is detected. A record without a sum was
written by an earlier version, and only its shape is checked.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError

from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.files import write_json

RECORD_SUM_KEY = "sum"
RECORD_SUM_PREFIX = "sha256:"
# Exceptions of readers of files whose content is not what they expect.
READ_ERRORS = (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
# Characters of a wrong value that an error shows.
MAX_SHOWN_VALUE = 60

# Parts of the shapes of records. Larger numbers are not counts, whatever they are.
Count = Annotated[int, Field(ge=0, le=2**53)]
FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


class RecordShape(BaseModel):
    """The keys that readers of a record rely on, with their types and ranges. A record may have other keys besides."""

    model_config = ConfigDict(extra="allow", strict=True)


class DamagedRecord(UserError):
    """A file does not have the content that it was written with. The text names the file."""


@contextlib.contextmanager
def refuse_damage(file: Path, advice: str = "") -> Iterator[None]:
    """Names a file in the errors of the block, which reads it.

    Raises:
        DamagedRecord: the file cannot be read, or its content is not what the block expects.
    """
    try:
        yield
    except UserError:
        raise
    except READ_ERRORS as error:
        problem = f"is damaged: {type(error).__name__}: {one_line(error)}"
        raise DamagedRecord(f"{file}: {problem}{advice and f'; {advice}'}") from None


def seal_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record with its sum as the last key."""
    # The sum is of the record as it will be read: JSON makes texts of keys that are numbers, which changes their order.
    content = json.loads(json.dumps(_drop_sum(record)))
    return {**content, RECORD_SUM_KEY: _compute_sum(content)}


def write_sealed_json(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces the content of `path` by the sealed record, or leaves it as it was."""
    write_json(path, seal_record(record))


def _compute_sum(content: Mapping[str, Any]) -> str:
    """Returns the sum of keys and values, which neither the order of the keys nor the layout of the file changes."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return RECORD_SUM_PREFIX + hashlib.sha256(canonical.encode()).hexdigest()


def _drop_sum(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != RECORD_SUM_KEY}


def has_wrong_sum(record: Mapping[str, Any]) -> bool:
    """Returns True if a record differs from its sum, or has a sum under another key, which is that key damaged."""
    if RECORD_SUM_KEY in record:
        return bool(record[RECORD_SUM_KEY] != _compute_sum(_drop_sum(record)))
    return any(isinstance(value, str) and value.startswith(RECORD_SUM_PREFIX) for value in record.values())


def check_shape(value: Any, shape: TypeAdapter[Any], where: str, advice: str = "") -> Any:
    """Returns `value`, which was read as JSON, after a check of its shape.

    Raises:
        DamagedRecord: begins with `where`, names the first key that is wrong and its value, and ends with `advice`.
    """
    try:
        shape.validate_python(value, strict=True)
    except (ValidationError, RecursionError) as error:
        raise DamagedRecord(f"{where}: {_describe_shape_error(error)}{advice and f'; {advice}'}") from None
    return value


def _describe_shape_error(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "is damaged: it is nested too deeply"
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    problem = one_line(first["msg"].replace("Input should", "must").removeprefix("Value error, "))
    if first["type"] == "missing":
        return f"is damaged: {key} is missing"
    return f"is damaged: {key and f'{key} = '}{_show_value(first['input'])}: {problem}"


def _show_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_VALUE else f"{text[:MAX_SHOWN_VALUE]}..."


def parse_record(data: bytes, shape: TypeAdapter[Any], where: str, advice: str = "") -> dict[str, Any]:
    """Returns the record that `data` holds as JSON, without its sum, after a check of both.

    Raises:
        DamagedRecord: as `check_shape`; or the data are no JSON object, or differ from their sum.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{where}: is damaged: no JSON ({one_line(error, 80)}){advice and f'; {advice}'}") from None
    if not isinstance(record, dict):
        raise DamagedRecord(f"{where}: is damaged: {_show_value(record)} is no JSON object{advice and f'; {advice}'}")
    if has_wrong_sum(record):
        raise DamagedRecord(f"{where}: is damaged: its content differs from its sum{advice and f'; {advice}'}")
    found: dict[str, Any] = check_shape(_drop_sum(record), shape, where, advice)
    return found


def read_json_record(path: Path, shape: TypeAdapter[Any], advice: str = "") -> dict[str, Any] | None:
    """Returns the record in a file, None if there is no file.

    Raises:
        DamagedRecord: as `parse_record`, or the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedRecord(f"{path}: cannot be read: {error.strerror}") from None
    return parse_record(data, shape, str(path), advice)


def read_json_rows(path: Path, shape: TypeAdapter[Any], advice: str = "") -> list[Any]:
    """Returns the rows of a JSON-lines file, [] if there is no file.

    A line that is no JSON is left out: a killed process did not finish it.

    Raises:
        DamagedRecord: as `check_shape`, with the number of the line; or the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DamagedRecord(f"{path}: cannot be read: {error.strerror}") from None
    return list(parse_json_rows(data, shape, str(path), advice))


def parse_json_rows(
    data: bytes, shape: TypeAdapter[Any], where: str, advice: str = "", first_line: int = 1
) -> list[Any]:
    """Returns the rows of JSON lines as `read_json_rows`. `first_line`: the number of the first one in its file."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), first_line):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows.append(check_shape(row, shape, f"{where}: line {number}", advice))
    return rows
