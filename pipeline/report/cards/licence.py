"""The licence in a model card: that of the existing weights that a network comes from, for readers and for hubs.

The known facts of weights were written by others: all of them are shown as code, and quoted in the front matter.
"""

import re
from collections.abc import Mapping

from firstlight.pipeline.report.cards.markdown import format_code, format_table
from firstlight.tasks.nn.weights.weight_sources import find_hub_model

UNKNOWN_LICENCE, OTHER_LICENCE = "unknown", "other"
# The identifiers that the Hugging Face hub takes (huggingface.co/docs/hub/repositories-licenses); any other licence is
# `other`, with a name.
HUB_LICENCES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openmdw-1.0",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "grok2-community",
        "gemma",
    ]
)
MAX_NAME_LENGTH, MAX_TEXT_LENGTH = 64, 2000
# The names of the facts of weights in the card.
FACT_LABELS = {
    "source": "source",
    "part": "part of the file",
    "layout": "names of the tensors",
    "sha256": "sha256 of the file",
    "licence": "licence",
}
IMAGES_SENTENCE = (
    "The images that the network was trained on may have licences of their own, which the run does not know; they were "
    "not examined for biases. The numbers above hold for the data set above only."
)
CODE_SENTENCE = "The code of Firstlight is licensed under Apache-2.0."


def list_licence_fields(origin: Mapping[str, str]) -> dict[str, str]:
    """Returns the fields of a front matter about the licence, and the model of a hub that the network is based on.

    `origin`: what is known of the existing weights, as `trace_weights` returns it; {} if there are none.
    """
    licence = origin.get("licence", "")
    fields = {"license": _identify_licence(licence)}
    if fields["license"] == OTHER_LICENCE:
        fields["license_name"] = _make_slug(licence)
    base = find_hub_model(origin.get("source", ""))
    return fields | ({"base_model": base} if base else {})


def describe_licence(origin: Mapping[str, str]) -> str:
    """Returns the section about the licence. `origin`: as for `list_licence_fields`."""
    heading = "## Licence and limits\n\n"
    if not origin:
        return (
            f"{heading}{CODE_SENTENCE} The licence of these weights is unknown: it depends on the licence of the "
            "images that they were learned from, which the run does not know. The images were not examined for biases. "
            "The numbers above hold for the data set above only."
        )
    stated = origin.get("licence")
    rule = (
        f"their licence governs it: {format_code(_shorten(stated))}."
        if stated
        else "their licence, which governs it, is not known here: ask those who published them."
    )
    lines = [(label, format_code(_shorten(origin[key]))) for key, label in FACT_LABELS.items() if origin.get(key)]
    return (
        f"{heading}This network comes from existing weights, and {rule} {CODE_SENTENCE} {IMAGES_SENTENCE}\n\n"
        f"The existing weights:\n\n{format_table(('fact', 'value'), lines)}"
    )


def _identify_licence(text: str) -> str:
    """Returns the identifier of the Hugging Face hub for a licence: `unknown` for none, `other` for one it has not."""
    name = "-".join(text.lower().split())
    if not name:
        return UNKNOWN_LICENCE
    return name if name in HUB_LICENCES else OTHER_LICENCE


def _make_slug(text: str) -> str:
    """Returns a short name of small letters, digits, points and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())[:MAX_NAME_LENGTH].strip("-.") or "see-the-card"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[:MAX_TEXT_LENGTH]} ... ({len(text):,} characters)"
