"""The folder of a recipe is checked before anything is written into it."""

from pathlib import Path

import pytest

from firstlight.pipeline.data.mirror.places import place_storage
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.preparing.storage import check_storage


def test_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_storage(tmp_path / "new" / "runs")
    assert not list((tmp_path / "new" / "runs").iterdir())


def test_storage_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problem = f"^storage: '{tmp_path}/file/runs' cannot be written: Not a directory; valid: "
    with pytest.raises(UserError, match=problem):
        check_storage(tmp_path / "file" / "runs")


def test_bucket_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setenv("FIRSTLIGHT_STORAGE_CACHE", str(tmp_path))
    monkeypatch.setattr("firstlight.pipeline.run.mirroring.check_bucket", lambda mirror: asked.append(mirror.uri))
    check_storage(place_storage("memory://jobs/runs"))
    assert asked == ["memory://jobs/runs"]
