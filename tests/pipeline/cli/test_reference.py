"""docs/reference.md is what the models say."""

import re

import pytest

from firstlight.pipeline.cli.reference import make_anchor, render_reference
from tests.support.paths import ROOT
from tests.support.undescribed_keys import list_undescribed_keys

REFERENCE = ROOT / "docs" / "reference.md"


def test_committed_reference_is_generated() -> None:
    assert REFERENCE.read_text("utf-8") == render_reference(), "run `make reference`"


def test_every_key_has_a_meaning() -> None:
    assert list_undescribed_keys() == []


def test_links_lead_to_headings_and_files() -> None:
    text = render_reference()
    anchors = {make_anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "#optimisers" in links
    for link in links:
        file, _, anchor = link.partition("#")
        if file:
            assert (ROOT / "docs" / file).exists(), link
            anchors_there = {make_anchor(line.lstrip("# ")) for line in _read_headings(file)} if anchor else {""}
        else:
            anchors_there = anchors
        assert anchor in anchors_there, link


def _read_headings(file: str) -> list[str]:
    return [line for line in (ROOT / "docs" / file).read_text("utf-8").splitlines() if line.startswith("#")]


@pytest.mark.parametrize(
    "heading", ["### `nat`", "### `finetune`", "### `random_shift`", "#### `pbt`", "### `convnet`"]
)
def test_registered_entry_has_a_section(heading: str) -> None:
    assert heading in render_reference().splitlines()


def test_key_is_described_once_in_its_section() -> None:
    rows = [line for line in render_reference().splitlines() if line.startswith("| `clip_norm` |")]
    assert len(rows) == 1
    assert "number > 0 or `null` | `null` | The largest norm of the gradient." in rows[0]
