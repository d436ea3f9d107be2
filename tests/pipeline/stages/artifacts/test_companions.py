"""Networks that are saved with an encoder are loaded with every bit, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts.companions import load_companion, load_decoder, load_head, save_network
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.heads import Projection
from tests.support.saved_encoders import DAMAGE


def make_companion(what: str) -> Any:
    torch.manual_seed(1)
    if what == "head":
        return Projection(8, [6], 4, dropout=0.0, norm="batch", pool="avg")
    return Decoder([(4, 4, 4), (8, 2, 2)], 3, 8)


@pytest.mark.parametrize("what", ["head", "decoder"])
def test_companion_is_loaded_with_every_bit(tmp_path: Path, what: str) -> None:
    own = make_companion(what)
    save_network(own, tmp_path, {"seed": 3})
    found = load_companion(tmp_path, what)
    assert isinstance(found, nn.Module)
    assert type(found) is type(own)
    assert found.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_companion_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_network(make_companion("head"), tmp_path, {})
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not a whole decoder: network.json describes a Projection$"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("file", ["network.json", "network.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_companion_names_the_file(tmp_path: Path, file: str, kind: str) -> None:
    save_network(make_companion("head"), tmp_path, {})
    DAMAGE[kind](tmp_path / file)
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not a whole head: .*{file}") as told:
        load_head(tmp_path)
    assert "\n" not in str(told.value)
