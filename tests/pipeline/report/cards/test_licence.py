"""The licence of existing weights governs the card of what comes from them, whatever its text is."""

from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from firstlight.pipeline.report.cards.card_parts import make_front_matter
from firstlight.pipeline.report.cards.licence import HUB_LICENCES, describe_licence, list_licence_fields
from tests.support import recipes

HOSTILE = (
    'free"\nlicense: mit\n---\n# Ignore the above\n<script>alert(1)</script>',
    "a | b \\| <img src=x onerror=alert(1)> ``` [x](javascript:alert(1)) `",
    "!!python/object/apply:os.system ['true']",
    "\u202egpl\x1b[31m\x00",
    "x" * 100_000,
)


def render_html(text: str) -> str:
    """Returns the HTML of a card, by a renderer that lets HTML through."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


@pytest.mark.parametrize(
    ("told", "fields"),
    [
        ("", {"license": "unknown"}),
        ("apache-2.0", {"license": "apache-2.0"}),
        ("Apache 2.0", {"license": "apache-2.0"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("Free for research; ask us", {"license": "other", "license_name": "free-for-research-ask-us"}),
        ("许可", {"license": "other", "license_name": "see-the-card"}),
    ],
)
def test_licence_is_one_that_the_hub_knows_or_other_with_a_name(told: str, fields: dict[str, str]) -> None:
    assert list_licence_fields({"sha256": "0", "licence": told}) == fields


def test_base_model_is_named_where_the_hub_has_the_weights() -> None:
    def name_base(source: str) -> str | None:
        return list_licence_fields({"source": source}).get("base_model")

    assert name_base("timm:resnet18.a1_in1k") == "timm/resnet18.a1_in1k"
    assert name_base("hf-hub:owner/name@v1") == "owner/name"
    assert name_base("hf-hub:owner/na\nme") is None
    assert name_base("timm:resnet18.of_another_version") is None
    assert name_base("file.safetensors") is None


def test_section_tells_where_the_weights_are_from_and_what_governs() -> None:
    text = describe_licence({"source": "timm:a.b", "sha256": "ab12", "layout": "timm", "licence": "cc-by-nc-4.0"})
    assert "comes from existing weights, and their licence governs it: `cc-by-nc-4.0`" in text
    for line in ("| source | `timm:a.b` |", "| sha256 of the file | `ab12` |", "| licence | `cc-by-nc-4.0` |"):
        assert line in text
    assert "part of the file" not in text
    assert "licence of these weights is unknown" in describe_licence({})
    assert "is not known here" in describe_licence({"source": "w.pth"})


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("key", ["licence", "source", "part"])
def test_no_text_leaves_its_place(tmp_path: Path, key: str, text: str) -> None:
    origin = {"licence": "mit", key: text}
    section = describe_licence(origin)
    html = render_html(section)
    for mark in ("<script", "<img", "<a ", "<h1"):
        assert mark not in html
    assert html.count("<h2>") == 1
    assert html.count("<tr>") == 1 + len(origin)
    assert len(section) < 20_000
    matter = make_front_matter(recipes.recipe(tmp_path), "image-classification", ["a"], origin)
    found = yaml.safe_load(matter.removeprefix("---").removesuffix("---"))
    wanted = {"license", "library_name", "pipeline_tag", "tags", "datasets"}
    assert found.keys() - {"license_name"} == wanted
    assert found["license"] == ("other" if key == "licence" else "mit")
    assert len(found.get("license_name", "")) <= 64


def test_identifiers_are_in_the_form_of_the_hub() -> None:
    assert {"apache-2.0", "mit", "cc-by-nc-4.0"} <= HUB_LICENCES
    assert all(name == name.lower() and not set(name) & set(" \n") for name in HUB_LICENCES)
