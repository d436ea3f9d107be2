"""Records of units in a bucket and in the working folder: what is damaged on either side is noticed, and replaced."""

from pathlib import Path

import pytest

from firstlight.pipeline.data.mirror.bucket import sum_bytes
from firstlight.pipeline.data.mirror.contents import CONTENTS_FILE, Contents
from firstlight.pipeline.data.mirror.unit_records import UnitRecords
from firstlight.pipeline.records import DamagedRecord
from tests.support.buckets import make_mirror

UNIT = "recipe/pretrain-seed0-abc"
FILES = Contents({"result.json": sum_bytes(b"done")})


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UnitRecords:
    return make_mirror(tmp_path / "here", "recorded", monkeypatch).records


def test_unknown_unit_has_no_record_on_either_side(records: UnitRecords) -> None:
    assert records.read_contents(UNIT) is None
    assert records.read_base(UNIT) == Contents()


def test_written_record_is_read_back_and_known_here(records: UnitRecords) -> None:
    records.write_contents(UNIT, FILES, FILES)
    found = records.read_contents(UNIT)
    assert found is not None
    assert found.files == FILES.files
    assert records.read_base(UNIT).known == found.known, "this machine has written it"


def test_record_without_a_note_keeps_the_files_that_were_noted(records: UnitRecords) -> None:
    records.write_contents(UNIT, FILES, FILES)
    records.write_contents(UNIT, Contents({**FILES.files, "more.json": sum_bytes(b"1")}))
    assert records.read_base(UNIT).files == FILES.files


def test_damaged_record_in_the_bucket_is_named_once_and_can_be_replaced(records: UnitRecords) -> None:
    records.write_contents(UNIT, FILES)
    records.bucket.write(f"{UNIT}/{CONTENTS_FILE}", b"{")
    with pytest.raises(DamagedRecord, match=CONTENTS_FILE):
        records.read_contents(UNIT)
    assert records.read_contents(UNIT) is None
    records.write_contents(UNIT, FILES)
    assert records.read_contents(UNIT) is not None
    assert not records.damaged


def test_damaged_note_counts_as_none(records: UnitRecords) -> None:
    records.write_base(UNIT, FILES)
    records.find_base_file(UNIT).write_bytes(b"{")
    assert records.read_base(UNIT) == Contents()
