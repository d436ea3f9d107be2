"""Fixtures of the tests of tracking."""

from pathlib import Path

import pytest

from firstlight.pipeline.tracking.client import TrackingClient
from tests.support import recipes


@pytest.fixture
def tracking(tmp_path: Path) -> TrackingClient:
    return TrackingClient(recipes.recipe(tmp_path))
