"""Checks of a library that are not repeated by later processes."""

from pathlib import Path

import pytest

from firstlight.pipeline.config.schemas import checked_specs as module
from firstlight.pipeline.config.schemas.checked_specs import check_once


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of checking code, in a process without torch and with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(module.sys.modules, "torch")
    file = tmp_path / "check.py"
    file.write_text("check = 1")
    return file


def forget_process() -> None:
    """Makes this process forget the passed checks, so that it knows the file alone, as the next process does."""
    module._open_passed.cache_clear()


def test_passed_check_is_not_repeated(code: Path) -> None:
    calls: list[str] = []
    check_once(code, {"lr": 0.1}, lambda: calls.append("first"))
    forget_process()
    check_once(code, {"lr": 0.1}, lambda: calls.append("again"))
    check_once(code, {"lr": 0.2}, lambda: calls.append("other"))
    assert calls == ["first", "other"]


def test_failed_check_is_repeated_each_time(code: Path) -> None:
    def refuse() -> None:
        raise ValueError("too large")

    for _ in range(2):
        forget_process()
        with pytest.raises(ValueError, match="too large"):
            check_once(code, "content", refuse)


@pytest.mark.parametrize("changed", ["code", "version", "torch"])
def test_other_code_other_versions_and_torch_check_again(
    code: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    calls: list[str] = []
    check_once(code, "content", lambda: calls.append("first"))
    forget_process()
    if changed == "code":
        code.write_text("check = 2")
    elif changed == "version":
        monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "99")
    else:
        monkeypatch.setitem(module.sys.modules, "torch", module)
    check_once(code, "content", lambda: calls.append("again"))
    assert calls == ["first", "again"]


def test_half_written_line_is_no_check(code: Path) -> None:
    calls: list[str] = []
    check_once(code, "content", lambda: calls.append("first"))
    file, _ = module._open_passed(code)
    file.write_text(file.read_text()[:20])
    forget_process()
    check_once(code, "content", lambda: calls.append("again"))
    assert calls == ["first", "again"]
