"""The version of the code changes with what decides a result, and only with that."""

import ast
from pathlib import Path

import pytest

from firstlight.pipeline.stages import code_version as module
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.stages.evaluate import EvaluateStage
from firstlight.pipeline.stages.export import ExportStage
from firstlight.pipeline.stages.pretrain import PretrainStage

SOURCE = '''
"""A module."""

from firstlight.pipeline.data.plan import BatchPlan


def double(value: int) -> int:
    """Returns twice the value."""
    # Twice.
    return 2 * value
'''


def flatten(source: str) -> list[str]:
    return list(module._flatten(ast.parse(source)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another text."""'),
        ('"""Returns twice the value."""', '"""Doubles."""'),
        ("    # Twice.\n", ""),
        ("def double(value: int) -> int:", "def double(\n    value: int,\n) -> int:"),
        ("firstlight.pipeline.data.plan", "firstlight.pipeline.data.batches.plan"),
    ],
)
def test_comments_docstrings_layout_and_moves_leave_the_version(old: str, new: str) -> None:
    assert old in SOURCE
    assert flatten(SOURCE.replace(old, new)) == flatten(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"), [("2 * value", "3 * value"), ("double", "twice"), ("BatchPlan", "Plan"), ("int:", "float:")]
)
def test_changed_code_changes_the_version(old: str, new: str) -> None:
    assert flatten(SOURCE.replace(old, new)) != flatten(SOURCE)


@pytest.mark.parametrize("kind", [PretrainStage, EvaluateStage, ExportStage])
def test_version_covers_what_a_kind_imports_and_no_text_of_commands_or_reports(kind: type) -> None:
    modules = module._imported_modules(kind.__module__)
    assert kind.__module__ in modules
    assert "firstlight.pipeline.data.plan" in modules
    assert "firstlight.tasks.nn.encoders" in modules
    parts = {name.split(".")[2] for name in modules if name.startswith("firstlight.pipeline.") and name.count(".") > 2}
    assert not parts & {"cli", "report", "tracking", "run", "search"}
    other = ExportStage if kind is not ExportStage else PretrainStage
    assert other.__module__ not in modules, "another kind of stage has a version of its own"


def test_kinds_have_different_versions_and_the_whole_has_one(tmp_path: Path) -> None:
    versions = {code_version(kind) for kind in (PretrainStage, EvaluateStage, ExportStage)}
    assert len({*versions, code_version()}) == 4
    assert all(len(version) == 64 for version in versions)


def test_changed_byte_of_a_method_changes_pretraining_and_not_export(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = PretrainStage.__module__, ExportStage.__module__
    before = [module._hash_modules(kind) for kind in kinds]
    name = "firstlight.tasks.pretrain.nat"
    real = module._parse_module

    def parse(wanted: str) -> ast.Module:
        return ast.parse("CHANGED = 1") if wanted == name else real(wanted)

    monkeypatch.setattr(module, "_parse_module", parse)
    module._digest_module.cache_clear()
    try:
        after = [module._hash_modules(kind) for kind in kinds]
    finally:
        module._digest_module.cache_clear()
    assert after[0] != before[0]
    assert (after[1] != before[1]) == (name in module._imported_modules(ExportStage.__module__))


def test_version_is_parsed_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = module._hash_modules(ExportStage.__module__)
    code_version.cache_clear()
    try:
        assert code_version(ExportStage) == expected
        code_version.cache_clear()
        monkeypatch.setattr(module, "_hash_modules", lambda start: "parsed again")
        assert code_version(ExportStage) == expected
        code_version.cache_clear()
        monkeypatch.setattr(module, "hash_sources", lambda files: "of a changed file")
        assert code_version(ExportStage) == "parsed again"
    finally:
        code_version.cache_clear()
