"""Facts that are kept until a source file changes."""

from pathlib import Path

import pytest

from firstlight.pipeline import code_cache
from firstlight.pipeline.code_cache import hash_sources, locate_cache, read_cached, write_cached


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_changed_file_and_changed_version_have_another_hash(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a = 1")
    two.write_text("b = 2")
    before = hash_sources([one, two], "torch 1")
    assert hash_sources([two, one], "torch 1") == before
    assert hash_sources([one, two], "torch 2") != before
    one.write_text("a = 3")
    assert hash_sources([one, two], "torch 1") != before


def test_fact_is_read_back_and_not_under_another_key() -> None:
    write_cached("fact", "a" * 64, {"x": [1, None]})
    assert read_cached("fact", "a" * 64) == {"x": [1, None]}
    assert read_cached("fact", "b" * 64) is None
    assert read_cached("other", "a" * 64) is None


def test_damaged_file_is_no_fact() -> None:
    write_cached("fact", "a" * 64, {"x": "yes"})
    (file,) = locate_cache().iterdir()
    file.write_text(file.read_text().replace("yes", "no!"))
    assert read_cached("fact", "a" * 64) is None


def test_folder_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_cached("fact", "a" * 64, {"x": 1})
    assert read_cached("fact", "a" * 64) is None


def test_oldest_of_many_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "MAX_CACHED_FILES", 2)
    write_cached("other", "0" * 64, {})
    for digit in "123":
        write_cached("fact", digit * 64, {"x": digit})
    assert len(list(locate_cache().glob("fact-*.json"))) == 2
    assert read_cached("fact", "3" * 64) == {"x": "3"}
    assert read_cached("other", "0" * 64) == {}


def test_relative_folder_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", "/home/someone")
    assert locate_cache() == Path("/home/someone/.cache/firstlight")
