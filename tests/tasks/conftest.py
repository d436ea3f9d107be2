"""Weights whose random numbers are few."""

from collections.abc import Iterator

import pytest

from tests.support.repeated_draws import repeat_draws


@pytest.fixture
def repeated_draws() -> Iterator[None]:
    """Draws large weights from few random numbers. For tests in which only the place of a weight matters."""
    with repeat_draws():
        yield
