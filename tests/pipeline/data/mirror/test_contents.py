"""The record of a unit is checked; files that make others count are ordered last."""

import json
from dataclasses import replace

import pytest

from firstlight.pipeline.data.mirror.bucket import sum_bytes
from firstlight.pipeline.data.mirror.contents import Contents, hash_record, order_names, parse_contents
from firstlight.pipeline.records import DamagedRecord, seal_record

OLD, NEW = sum_bytes(b"old"), sum_bytes(b"new!")


def test_record_is_read_back_as_it_was_written() -> None:
    contents = Contents({"a/b": NEW}, {"a/b": OLD})
    data = contents.dump()
    assert parse_contents(data, "x") == replace(contents, known=(hash_record(data),))
    here = replace(contents, known=("ab" * 32, "cd" * 32))
    assert parse_contents(here.dump(is_here=True), "x") == here
    assert contents.accepts("a/b", NEW)
    assert contents.accepts("a/b", OLD), "a file that is being replaced"
    assert not contents.accepts("a/b", sum_bytes(b"other"))
    assert not contents.accepts("c", NEW)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//b", ".hidden", "."])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    data = json.dumps(seal_record({"files": {name: NEW}})).encode()
    with pytest.raises(DamagedRecord, match=r"^x: is damaged: files"):
        parse_contents(data, "x")


def test_changed_record_is_refused() -> None:
    data = Contents({"a": NEW}).dump()
    with pytest.raises(DamagedRecord, match="differs from its sum"):
        parse_contents(data.replace(b'"bytes": 4', b'"bytes": 5'), "x")


def test_files_that_make_a_folder_count_are_last() -> None:
    names = ["result.json", "encoder/manifest.json", "metrics.jsonl", "published.json", "encoder/a", "manifest.json"]
    assert order_names(names) == [
        *("encoder/a", "metrics.jsonl", "encoder/manifest.json"),
        *("published.json", "manifest.json", "result.json"),
    ]
