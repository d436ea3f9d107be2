"""The folder of a local Ray: short, closed to others, and gone at the end, also those of killed processes."""

import os
import signal
import time
from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import ray_folder
from firstlight.pipeline.run.ray_folder import make_ray_folder
from tests.support.clean_process import run_in_clean_process


@pytest.fixture(autouse=True)
def no_ray_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands for /tmp: a folder whose path counts as short enough."""
    folder = tmp_path / "short"
    folder.mkdir()
    monkeypatch.setattr(ray_folder, "SHORT_FOLDERS", (str(folder),))
    monkeypatch.setattr(ray_folder, "MAX_SOCKET_PATH_BYTES", 85 + len(str(folder)))
    return folder


def use_as_temporary(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))


def test_folder_is_private_and_removed(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_as_temporary(monkeypatch, short)
    with make_ray_folder() as made:
        assert made.spilling is None
        assert made.path.parent.parent == short
        assert made.path.parent.stat().st_mode & 0o777 == 0o700
        made.path.mkdir()
        (made.path / "session").write_text("x")
    assert list(short.iterdir()) == []


def test_long_folder_gets_spilled_objects_only(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = short.parent / ("x" * 60)
    use_as_temporary(monkeypatch, long)
    with make_ray_folder() as made:
        assert made.path.parent.parent == short
        assert made.spilling is not None
        assert made.spilling.parent == long
        assert made.spilling.stat().st_mode & 0o777 == 0o700
    assert list(short.iterdir()) == list(long.iterdir()) == []


def test_no_short_folder_is_one_line_that_names_tmpdir(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = short.parent / ("x" * 60)
    use_as_temporary(monkeypatch, long)
    monkeypatch.setattr(ray_folder, "SHORT_FOLDERS", (str(short / "none"),))
    with (
        pytest.raises(UserError, match=rf"^TMPDIR: '{long}' is not valid for Ray: .*; valid: a folder"),
        make_ray_folder(),
    ):
        pass


def die_with_folder(base: Path) -> None:
    import tempfile

    tempfile.tempdir = str(base)
    ray_folder.MAX_SOCKET_PATH_BYTES = 1000
    with make_ray_folder():
        os.kill(os.getpid(), signal.SIGKILL)


def test_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_in_clean_process(die_with_folder, tmp_path) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(ray_folder, "MAX_SOCKET_PATH_BYTES", 1000)
    use_as_temporary(monkeypatch, tmp_path)
    with make_ray_folder():
        assert left.exists(), "it may have been made just now"
        old = time.time() - 3600
        os.utime(left, (old, old))
        (other,) = (folder for folder in tmp_path.iterdir() if folder != left)
        os.utime(other, (old, old))
        with make_ray_folder():
            assert not left.exists()
            assert other.exists(), "its process lives"
