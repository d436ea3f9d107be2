"""Records: written with a sum, read back with a check of the sum and of the shape."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from firstlight.pipeline.records import (
    Count,
    DamagedRecord,
    FiniteNumber,
    HexDigest,
    RecordShape,
    Share,
    parse_record,
    read_json_record,
    read_json_rows,
    seal_record,
    write_sealed_json,
)


class Scored(RecordShape):
    number: Count
    scores: list[Share]
    name: str = ""


SCORED = TypeAdapter(Scored)
WHOLE: dict[str, Any] = {"number": 3, "scores": [0.5, 1], "name": "ä", "other": {"free": None}}


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "a.json", WHOLE)
    assert read_json_record(tmp_path / "a.json", SCORED) == WHOLE
    assert read_json_record(tmp_path / "none.json", SCORED) is None
    assert json.loads((tmp_path / "a.json").read_text()).keys() == {*WHOLE, "sum"}


@pytest.mark.fault(18, "every bit of a record")
def test_every_flipped_bit_is_detected() -> None:
    data = json.dumps(seal_record(WHOLE), ensure_ascii=False).encode()
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(DamagedRecord, match=r"^a\.json: is damaged: .*; delete it$"):
            parse_record(bytes(changed), SCORED, "a.json", "delete it")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_any_record_survives_its_file(record: dict[str, Any]) -> None:
    sealed = json.dumps(seal_record(record))
    found = parse_record(sealed.encode(), TypeAdapter(dict[str, Any]), "x")
    assert json.dumps(found) == json.dumps({key: value for key, value in record.items() if key != "sum"})


@given(json_values)
def test_any_json_is_the_record_or_one_line(value: Any) -> None:
    told = ""
    try:
        assert parse_record(json.dumps(value).encode(), SCORED, "dir/a.json") == value
    except DamagedRecord as error:
        told = str(error)
    assert told == "" or told.startswith("dir/a.json: is damaged: ")
    assert len(told.split("\n")) == 1


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"scores": []}, "number is missing"),
        ({"number": -1, "scores": []}, "number = -1: must be greater than or equal to 0"),
        ({"number": 1e9, "scores": []}, "number = 1000000000.0: must be a valid integer"),
        ({"number": True, "scores": []}, "number = True: must be a valid integer"),
        ({"number": 2**60, "scores": []}, f"number = {2**60}: must be less than or equal to {2**53}"),
        ({"number": 1, "scores": [99]}, "scores.0 = 99: must be less than or equal to 1"),
        ({"number": 1, "scores": [float("nan")]}, "scores.0 = nan: must be"),
        ({"number": 1, "scores": "x" * 100}, f"scores = '{'x' * 59}...: must be a valid list"),
    ],
)
def test_wrong_shape_is_one_line_with_the_key_and_the_value(wrong: dict[str, Any], problem: str) -> None:
    for record in (wrong, seal_record(wrong)):
        with pytest.raises(DamagedRecord) as told:
            parse_record(json.dumps(record).encode(), SCORED, "a.json")
        assert str(told.value).startswith(f"a.json: is damaged: {problem}")


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_record_that_is_no_object_is_a_one_line_error(data: bytes) -> None:
    with pytest.raises(DamagedRecord, match=r"^a\.json: is damaged: .*$"):
        parse_record(data, SCORED, "a.json")


def test_deep_nesting_in_a_free_key_is_the_record_or_one_line() -> None:
    deep = b'{"number": 1, "scores": [], "other": ' + b"[" * 600 + b"]" * 600 + b"}"
    assert parse_record(deep, SCORED, "a.json")["number"] == 1


def test_folder_in_the_place_of_a_record_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DamagedRecord, match=rf"^{tmp_path}: cannot be read: Is a directory$"):
        read_json_record(tmp_path, SCORED)
    with pytest.raises(DamagedRecord, match=rf"^{tmp_path}: cannot be read: Is a directory$"):
        read_json_rows(tmp_path, SCORED)


def test_rows_without_a_line_that_a_killed_process_left_incomplete(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read_json_rows(file, SCORED) == []
    row = {"number": 1, "scores": []}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row)[:9] + json.dumps(row) + "\n" + json.dumps(row)[:5])
    assert read_json_rows(file, SCORED) == [row]


def test_wrong_row_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"number": 1, "scores": []}\n[1]\n')
    with pytest.raises(DamagedRecord, match=rf"^{file}: line 2: is damaged: \[1\]: must be .*; run again$"):
        read_json_rows(file, SCORED, "run again")


@pytest.mark.parametrize(("digest", "valid"), [("0" * 64, True), ("0" * 64 + "\n", False), ("A" * 64, False)])
def test_digest_has_64_digits_and_no_newline(digest: str, valid: bool) -> None:
    shape = TypeAdapter(dict[str, HexDigest])
    record = json.dumps({"a": digest}).encode()
    if valid:
        assert parse_record(record, shape, "a")
    else:
        with pytest.raises(DamagedRecord):
            parse_record(record, shape, "a")


def test_finite_number_may_be_whole_or_negative_and_not_infinite() -> None:
    shape = TypeAdapter(dict[str, FiniteNumber])
    assert parse_record(b'{"a": -3, "b": 0.5}', shape, "a")
    with pytest.raises(DamagedRecord, match="finite"):
        parse_record(b'{"a": Infinity}', shape, "a")
