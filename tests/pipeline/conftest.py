"""Networks that checks of recipes build once."""

from collections.abc import Iterator

import pytest

from tests.support.built_once import build_networks_once


@pytest.fixture(scope="module")
def networks_built_once() -> Iterator[None]:
    """For modules that check many recipes."""
    with build_networks_once():
        yield
