"""The origin of an encoder holds the known facts of how it was made, and nothing else."""

from pathlib import Path

from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.exporting.encoder_origin import read_encoder_origin
from firstlight.tasks.nn.encoders import Encoder


def test_origin_has_the_known_facts_of_the_right_type(tmp_path: Path) -> None:
    known = {"method": {"name": "nat"}, "store": "0a1b", "seed": 3}
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2}, 8)
    save_encoder(encoder, tmp_path, {**known, "arm": 7, "task": "classify", "weights": {"source": "w.pth"}})
    assert read_encoder_origin(tmp_path) == known
