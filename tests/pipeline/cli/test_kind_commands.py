"""Each kind of stage has a command, whose help is known without an import of its section."""

import subprocess
import sys
from typing import get_args

import pytest

from firstlight.pipeline.cli.kind_commands import list_command_helps
from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.stages.sections.known import KNOWN_SECTIONS
from tests.support.own_training import OwnTraining, know_own_training
from tests.support.paths import ROOT

# It prints the help, and which of the sections it has imported.
LISTING = """
import sys
from click.testing import CliRunner
from firstlight.pipeline.cli.main import cli
assert CliRunner().invoke(cli, sys.argv[1:]).exit_code == 0
print([name for name in sys.modules if name.startswith(("firstlight.pipeline.stages", "pydantic"))])
"""


def kind_of(section: type[StageConfig]) -> str:
    (kind,) = get_args(section.model_fields["kind"].annotation)
    return str(kind)


def test_helps_in_the_source_are_those_of_the_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {kind_of(section): section.command_help for section in KNOWN_SECTIONS}
    assert all(expected.values())
    monkeypatch.delitem(sys.modules, "firstlight.pipeline.config.stages")
    assert list_command_helps() == expected


def test_help_of_commands_imports_no_section() -> None:
    for arguments in (["--help"], ["embed", "--help"]):
        found = subprocess.run([sys.executable, "-c", LISTING, *arguments], cwd=ROOT, capture_output=True, check=True)
        assert found.stdout == b"[]\n"


def test_kind_of_another_package_has_a_command_once_it_is_registered() -> None:
    assert kind_of(OwnTraining) not in list_command_helps()
    with know_own_training():
        assert list_command_helps()[kind_of(OwnTraining)] == OwnTraining.command_help
