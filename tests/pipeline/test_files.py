"""Files that are whole or absent, and locks that end with their process."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import (
    append_json_line,
    atomic_folder,
    atomic_path,
    exclusive_lock,
    find_lock_owner,
    name_file_in_errors,
    wait_for_lock,
    write_atomically,
    write_json,
)


def test_atomic_path_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    with atomic_path(file) as temporary:
        temporary.write_bytes(b"new")
        assert file.read_bytes() == b"old"
        assert temporary.parent == tmp_path
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_error_in_atomic_path_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")

    def write_half() -> None:
        with atomic_path(file) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_write_json_is_read_back_and_lines_are_appended(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    write_atomically(tmp_path / "rows", b"")
    for row in ({"step": 1}, {"step": 2}):
        append_json_line(tmp_path / "rows", row)
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_errors_of_the_disk_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"), name_file_in_errors(tmp_path / "full"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match=r"missing/a"):
        write_atomically(tmp_path / "missing" / "a", b"")


def _hold_lock(folder: Path, ready: Path) -> None:
    with exclusive_lock(folder, "held"):
        ready.touch()
        time.sleep(60)


def _start_holder(folder: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_hold_lock, args=(folder, folder / "ready"))
    folder.mkdir(exist_ok=True)
    process.start()
    end = time.monotonic() + 30
    while not (folder / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


def test_second_process_is_refused_with_the_id_of_the_first(tmp_path: Path) -> None:
    process = _start_holder(tmp_path / "run")
    try:
        assert find_lock_owner(tmp_path / "run") == str(process.pid)
        with (
            pytest.raises(UserError, match=rf"^name: 'small' is being run by process {process.pid}; wait for it"),
            exclusive_lock(tmp_path / "run", "small"),
        ):
            pass
    finally:
        process.kill()
        process.join()


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = _start_holder(tmp_path / "run")
    process.kill()
    process.join()
    assert find_lock_owner(tmp_path / "run") is None
    with exclusive_lock(tmp_path / "run", "small", timeout_s=5):
        assert find_lock_owner(tmp_path / "run") == str(os.getpid())
    assert find_lock_owner(tmp_path / "never") is None


def test_wait_for_lock_creates_its_file_and_lets_the_next_one_in(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    for _ in range(2):
        with wait_for_lock(file):
            assert file.exists()


def fill_folder(folder: Path, error: Exception | None = None, other: Path | None = None) -> None:
    """Makes a folder with one file, and meanwhile `other` with one."""
    with atomic_folder(folder) as part:
        part.mkdir()
        (part / "a").write_text("1")
        assert not folder.exists()
        if other is not None:
            other.mkdir()
            (other / "theirs").touch()
        if error is not None:
            raise error


def test_folder_is_whole_or_absent(tmp_path: Path) -> None:
    fill_folder(tmp_path / "whole")
    with pytest.raises(ValueError, match="broken"):
        fill_folder(tmp_path / "broken", ValueError("broken"))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert (tmp_path / "whole/a").read_text() == "1"


def test_folder_that_another_process_has_made_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"):
        fill_folder(tmp_path / "made", other=tmp_path / "made")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "theirs"]
