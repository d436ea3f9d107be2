"""Machine code is kept with its sums: what is damaged is compiled again, and never run."""

import os
from pathlib import Path

import pytest

from firstlight.pipeline.child_module import end_processes, start_module
from firstlight.pipeline.data.augment.compiled import kept_code
from firstlight.pipeline.data.augment.compiled.compiler import compile_for_python
from firstlight.pipeline.files import LOCK_FILE, wait_for_lock
from tests.support.compiled_views import compile_views


def keep_code(folder: Path) -> Path:
    """Fills a folder as `compile_machine_code` does, by a compiler that takes no time."""
    folder.mkdir()
    (folder / "place").mkdir()
    (folder / "place" / "views.nbi").write_bytes(b"index")
    (folder / "place" / "views.1.nbc").write_bytes(bytes(1000))
    kept_code.write_sealed_json(folder / kept_code.CODE_MANIFEST, {"files": kept_code._sum_files(folder)})
    return folder


def test_a_folder_is_whole_as_long_as_nothing_of_it_changes(tmp_path: Path) -> None:
    assert not kept_code.is_whole(tmp_path / "none")
    for number, name in enumerate(("place/views.nbi", "place/views.1.nbc", kept_code.CODE_MANIFEST)):
        for change in ("cut", "bit", "gone"):
            folder = keep_code(tmp_path / f"{number} {change}")
            assert kept_code.is_whole(folder)
            data = (folder / name).read_bytes()
            if change == "gone":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(data[:-1] if change == "cut" else bytes([data[0] ^ 1]) + data[1:])
            assert not kept_code.is_whole(folder), (name, change)
    (folder := keep_code(tmp_path / "more")).joinpath("place", "other.nbi").touch()
    assert not kept_code.is_whole(folder)


def test_damaged_code_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = list[Path]()

    def compile_quickly(folder: Path) -> None:
        assert not list(folder.rglob("*.nb?")), "the damaged files are removed first"
        (folder / "place").mkdir()
        (folder / "place" / "views.nbi").write_bytes(b"new")
        compiled.append(folder)

    monkeypatch.setattr(kept_code, "load_machine_code", compile_quickly)
    folder = keep_code(tmp_path / "code")
    kept_code.compile_machine_code(folder)
    assert compiled == []
    (folder / "place" / "views.1.nbc").write_bytes(bytes(999))
    kept_code.compile_machine_code(folder)
    assert compiled == [folder]
    assert kept_code.is_whole(folder)


def test_code_that_is_kept_is_loaded_and_not_compiled() -> None:
    compile_views()
    folder = kept_code.locate_machine_code()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.nb?")}
    assert len(before) == 2
    again = kept_code.load_machine_code(folder)
    assert sum(again.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.nb?")} == before
    assert compile_for_python.__module__.endswith("compiler")


def test_the_folder_follows_from_sources_place_and_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = kept_code.locate_machine_code()
    assert before == kept_code.locate_machine_code()
    (tmp_path / "cpu").write_text("processor : 0\nmodel name : another\nflags : sse\nMHz : 1\n\nprocessor : 1\n")
    monkeypatch.setattr(kept_code, "CPU_FILE", tmp_path / "cpu")
    other = kept_code.locate_machine_code()
    assert other != before
    (tmp_path / "cpu").write_text("processor : 0\nmodel name : another\nflags : sse\nMHz : 2\n\nprocessor : 1\n")
    assert kept_code.locate_machine_code() == other, "the frequency changes all the time"
    monkeypatch.setattr(kept_code, "CPU_FILE", tmp_path / "none")
    assert kept_code.locate_machine_code() not in (before, other)
    before = kept_code.locate_machine_code()
    (tmp_path / "compiled").mkdir()
    for file in [*kept_code.AUGMENT_SOURCES.glob("*.py"), *kept_code.AUGMENT_SOURCES.glob("compiled/*.py")]:
        (tmp_path / file.relative_to(kept_code.AUGMENT_SOURCES)).write_bytes(file.read_bytes())
    monkeypatch.setattr(kept_code, "AUGMENT_SOURCES", tmp_path)
    found = [kept_code.locate_machine_code()]
    for file in (tmp_path / "pixel_params.py", tmp_path / "compiled" / "colors.py"):
        file.write_text(file.read_text("utf-8") + "\n", "utf-8")
        found.append(kept_code.locate_machine_code())
    assert len({before, *found}) == 4


def test_old_versions_are_removed(tmp_path: Path) -> None:
    current = tmp_path / f"{kept_code.FOLDER_PREFIX}current"
    for age in range(kept_code.MAX_KEPT_VERSIONS + 3):
        (folder := tmp_path / f"{kept_code.FOLDER_PREFIX}{age}").mkdir()
        os.utime(folder, (1000 - age, 1000 - age))
    (tmp_path / "another").mkdir()
    current.mkdir()
    kept_code._remove_old_versions(current)
    kept = {f"{kept_code.FOLDER_PREFIX}{age}" for age in range(kept_code.MAX_KEPT_VERSIONS)}
    assert {folder.name for folder in tmp_path.iterdir()} == {*kept, current.name, "another"}


def test_the_process_that_compiles_waits_for_another_one_and_tells_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = kept_code.locate_machine_code()
    folder.parent.mkdir()
    keep_code(folder)
    with wait_for_lock(folder / LOCK_FILE):
        process = start_module(kept_code.__name__)
        with pytest.raises(Exception, match="timed out"):
            process.wait(2)
    assert process.stdout is not None
    assert process.stdout.readline() == b'{"problem": ""}\n'
    assert process.wait() == 0
    end_processes([process], [])
    folder.rename(tmp_path / "moved")
    folder.touch()
    process = start_module(kept_code.__name__)
    assert process.stdout is not None
    assert b"FileExistsError" in process.stdout.readline()
    end_processes([process], [])
