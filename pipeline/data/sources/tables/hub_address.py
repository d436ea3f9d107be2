"""Addresses of data sets on a Hugging Face hub: hf://owner/name@revision?config=...&split=..."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from firstlight.pipeline.errors import UserError, suggest_valid

HUB_SCHEME = "hf://"
HUB_ADDRESS = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?/?(?:\?(?P<query>.*))?\Z", re.ASCII
)
HUB_PARTS = ("config", "split")


@dataclass(frozen=True)
class HubAddress:
    """A data set on a hub. `revision`: a branch, a tag or a commit; None is the main branch."""

    repo: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None


def parse_hub_address(root: str) -> HubAddress:
    """Returns the parts of an address.

    Raises:
        UserError: it is none; names `dataset.root`.
    """
    found = HUB_ADDRESS.match(root)
    if found is None:
        raise UserError(
            f"dataset.root: {root!r} is no data set on a hub; valid: hf://owner/name, hf://owner/name@revision, "
            "hf://owner/name?config=...&split=..."
        )
    parts = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
    for key, value in parts.items():
        if key not in HUB_PARTS:
            raise UserError(f"dataset.root: {root!r}: {key!r} is unknown; {suggest_valid(key, HUB_PARTS)}")
        if not value:
            raise UserError(f"dataset.root: {root!r}: {key} is empty; valid: a name")
    return HubAddress(found["repo"], found["revision"], parts.get("config"), parts.get("split"))
