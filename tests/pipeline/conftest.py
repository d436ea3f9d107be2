"""Figures that are not drawn."""

from collections.abc import Iterator

import pytest

from tests.support.undrawn_figures import leave_undrawn


@pytest.fixture(scope="module")
def undrawn_figures() -> Iterator[None]:
    """Saves figures as blank files, without drawing them. For modules whose tests look at something else."""
    with leave_undrawn():
        yield
