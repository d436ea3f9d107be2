"""Addresses of data sets on a hub."""

import pytest

from firstlight.pipeline.data.sources.tables.hub_address import HubAddress, parse_hub_address
from firstlight.pipeline.errors import UserError


@pytest.mark.parametrize(
    ("root", "wanted"),
    [
        ("hf://owner/name", HubAddress("owner/name")),
        ("hf://datasets/owner/name.v2/", HubAddress("owner/name.v2")),
        ("hf://owner/name@refs/convert/parquet", HubAddress("owner/name", "refs/convert/parquet")),
        ("hf://owner/name@v1.0?split=train", HubAddress("owner/name", "v1.0", None, "train")),
        ("hf://owner/name?config=a%20b&split=test", HubAddress("owner/name", None, "a b", "test")),
    ],
)
def test_parts_of_an_address(root: str, wanted: HubAddress) -> None:
    assert parse_hub_address(root) == wanted


@pytest.mark.parametrize(
    ("root", "problem"),
    [
        ("hf://name", "is no data set on a hub; valid: hf://owner/name"),
        ("hf://owner/name/data/x.parquet", "is no data set on a hub"),
        ("hf://owner/name@", "is no data set on a hub"),
        ("hf://owner/name?spilt=train", r"'spilt' is unknown; did you mean 'split'\? \(valid: config, split\)"),
        ("hf://owner/name?split=", "split is empty"),
    ],
)
def test_mistake_in_an_address_is_named(root: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.root: .*{problem}"):
        parse_hub_address(root)
