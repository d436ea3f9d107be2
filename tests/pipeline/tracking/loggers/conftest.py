"""Fixtures of the tests of loggers."""

from collections.abc import Iterator

import pytest

from firstlight.pipeline.tracking.loggers.registry import LOGGERS
from tests.support.kept_logger import KeptLogger


@pytest.fixture
def kept() -> Iterator[type[KeptLogger]]:
    """A logger of the name `kept`, which keeps in memory what it is told."""
    KeptLogger.forget()
    LOGGERS["kept"] = KeptLogger
    yield KeptLogger
    del LOGGERS["kept"]
