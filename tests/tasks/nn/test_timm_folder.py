"""Folders of weights as timm loads them."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import find_counterpart
from firstlight.tasks.nn.timm_folder import TIMM_CONFIG_FILE, describe_for_timm, write_timm_config

COLOURS = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}
VIT = {"name": "timm", "model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, **COLOURS}


@pytest.mark.parametrize("spec", [{"name": "resnet18", **COLOURS}, VIT])
def test_folder_is_loaded_by_its_name_with_its_preprocessing(tmp_path: Path, spec: dict[str, object]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(spec, 32).eval()
    found = find_counterpart(encoder, "timm")
    save_file(found.library_state(encoder), tmp_path / "model.safetensors")
    network = write_timm_config(tmp_path, describe_for_timm(encoder, found.model, found.options))
    assert network is not None
    images = torch.rand(2, 3, 32, 32)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(again)
    assert settings["mean"] == pytest.approx(COLOURS["mean"])
    assert settings["std"] == pytest.approx(COLOURS["std"])
    assert tuple(settings["input_size"]) == (3, 32, 32)
    with torch.no_grad():
        maps = [found.last_map(one)(encoder.input(images)) for one in (network, again)]
        for map_ in maps:
            torch.testing.assert_close(map_, encoder(images)[-1], rtol=1e-4, atol=1e-5)


def test_network_with_layers_after_the_last_map_leaves_no_config(tmp_path: Path) -> None:
    encoder = Encoder({"name": "timm", "model": "tf_efficientnet_lite0"}, 32).eval()
    found = find_counterpart(encoder, "timm")
    save_file(found.library_state(encoder), tmp_path / "model.safetensors")
    assert write_timm_config(tmp_path, describe_for_timm(encoder, found.model, found.options)) is None
    assert not (tmp_path / TIMM_CONFIG_FILE).exists()
