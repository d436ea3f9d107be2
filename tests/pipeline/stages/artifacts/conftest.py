"""A saved encoder, for the tests of this folder."""

from pathlib import Path

import pytest

from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from tests.support.saved_encoders import make_small_encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_encoder(make_small_encoder(), tmp_path / "encoder", {"method": {"name": "nat"}, "seed": 3})
    return tmp_path / "encoder"
