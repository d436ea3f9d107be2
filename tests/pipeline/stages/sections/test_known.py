"""The sections of all kinds of stages are known without the kinds themselves."""

import subprocess
import sys

from firstlight.pipeline.config.stages import STAGE_SECTIONS
from firstlight.pipeline.stages.registry import STAGES
from firstlight.pipeline.stages.sections.known import KNOWN_SECTIONS


def test_sections_are_those_of_the_kinds_in_their_order() -> None:
    assert [kind.section for kind in STAGES.values()] == list(KNOWN_SECTIONS)
    assert [STAGE_SECTIONS[kind] for kind in STAGES] == list(KNOWN_SECTIONS)


def test_recipes_are_checked_with_the_same_sections_in_the_same_order() -> None:
    code = "from firstlight.pipeline.{} import {}\nfrom firstlight.pipeline.config.stages import STAGE_SECTIONS\n"
    found = [
        subprocess.run(
            [sys.executable, "-c", code.format(*names) + "print(*STAGE_SECTIONS)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for names in (("stages.sections", "known"), ("stages", "registry"))
    ]
    assert found[0] == found[1]
    assert found[0].split() == list(STAGE_SECTIONS)[: len(KNOWN_SECTIONS)]
