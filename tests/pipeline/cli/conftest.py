"""Recorded runs that tests only read, made once per process."""

import pytest

from firstlight.pipeline.tracking.lineage import Lineage, read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support.mlflow_runs import Past, chain


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Past, dict[str, str]]:
    """Two recipes, the second of which evaluates an encoder of the first, and the ids of their runs."""
    return chain(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def run_ids(recorded: tuple[Past, dict[str, str]]) -> dict[str, str]:
    return recorded[1]


@pytest.fixture
def location(recorded: tuple[Past, dict[str, str]]) -> str:
    """The argument of the command line that names the storage."""
    return f"storage={recorded[0].storage}"


@pytest.fixture
def lineage(location: str) -> Lineage:
    return read_lineage(parse_location([location]))[0]
