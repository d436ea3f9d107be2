"""An instance is finished by its `result.json`, which is read once and checked."""

import json
from pathlib import Path

import pytest

from firstlight.pipeline.records import DamagedRecord
from firstlight.pipeline.stages import stage as module
from firstlight.pipeline.stages.stage import RESULT_ADVICE, RESULT_FILE, StageInstance, TrainingSegment


def make_instance(folder: Path) -> StageInstance:
    return StageInstance("evaluate", 3, "abc", folder)


def test_instance_has_no_result_until_one_is_written(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    assert instance.label == "evaluate seed 3"
    assert instance.result_file == tmp_path / RESULT_FILE
    assert instance.result is None
    instance.write_result({"knn": 0.5})
    assert instance.result == {"knn": 0.5}


def test_result_is_read_once_and_its_reader_may_change_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = make_instance(tmp_path)
    instance.write_result({"knn": 0.5})
    found = instance.result
    assert found is not None
    found["knn"] = 0.25
    monkeypatch.setattr(module, "read_json_record", lambda *_: pytest.fail("is read again"))
    assert instance.result == {"knn": 0.5}


def test_changed_result_is_read_again(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    for value in (0.5, 0.125):
        instance.write_result({"knn": value})
        assert instance.result == {"knn": value}


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_damaged_result_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    instance = make_instance(tmp_path)
    instance.result_file.write_text(content)
    with pytest.raises(DamagedRecord) as caught:
        _ = instance.result
    assert str(caught.value).startswith(f"{instance.result_file}: ")
    assert str(caught.value).endswith(RESULT_ADVICE)


def test_result_is_sealed_against_changed_values(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    instance.write_result({"knn": 0.5})
    fields = json.loads(instance.result_file.read_text())
    instance.result_file.write_text(json.dumps({**fields, "knn": 0.75}))
    with pytest.raises(DamagedRecord):
        _ = instance.result


def test_segment_is_by_default_the_whole_training() -> None:
    assert TrainingSegment("pretrain") == TrainingSegment("pretrain", (), None, None)
