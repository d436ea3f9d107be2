"""Folders of weights as timm loads them."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import Counterpart, find_counterpart
from firstlight.tasks.nn.timm_folder import TIMM_CONFIG_FILE, TimmFolder, describe_for_timm, write_timm_config

COLOURS = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}
VIT = {"name": "timm", "model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, **COLOURS}


def save_weights(folder: Path, spec: dict[str, object], size: int = 32) -> tuple[Encoder, Counterpart]:
    """Writes the weights of an encoder whose running statistics have moved, under timm's names."""
    torch.manual_seed(0)
    encoder = Encoder(spec, size).train()
    encoder(torch.rand(4, 3, size, size))
    found = find_counterpart(encoder.eval(), "timm")
    save_file(found.library_state(encoder), folder / "model.safetensors")
    return encoder, found


@pytest.mark.parametrize("spec", [{"name": "resnet18", **COLOURS}, VIT])
def test_folder_is_loaded_by_its_name_with_its_preprocessing(tmp_path: Path, spec: dict[str, object]) -> None:
    encoder, found = save_weights(tmp_path, spec)
    written = write_timm_config(tmp_path, describe_for_timm(encoder, found.model, found.options, licence="mit"))
    assert not written.gives_maps
    images = torch.rand(2, 3, 32, 32)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(again)
    assert settings["mean"] == pytest.approx(COLOURS["mean"])
    assert settings["std"] == pytest.approx(COLOURS["std"])
    assert tuple(settings["input_size"]) == (3, 32, 32)
    assert again.pretrained_cfg["license"] == "mit"
    with torch.no_grad():
        maps = [found.last_map(one)(encoder.input(images)) for one in (written.network, again)]
        for map_ in maps:
            torch.testing.assert_close(map_, encoder(images)[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["test_efficientnet", "mobilenetv3_small_050", "test_convnext"])
def test_network_with_layers_after_the_last_map_gives_its_maps(tmp_path: Path, model: str) -> None:
    encoder, found = save_weights(tmp_path, {"name": "timm", "model": model, **COLOURS}, 64)
    written = write_timm_config(tmp_path, describe_for_timm(encoder, found.model, found.options))
    assert written.gives_maps
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    loaded = TimmFolder(again, gives_maps=True)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        own = encoder(images)[-1]
        assert loaded.last_map(encoder.input(images)).shape == own.shape
        torch.testing.assert_close(loaded.last_map(encoder.input(images)), own, rtol=1e-4, atol=1e-5)
    settings = timm.data.resolve_model_data_config(again)
    assert settings["std"] == pytest.approx(COLOURS["std"])


def test_maps_with_their_channels_last_are_turned() -> None:
    network = torch.nn.Module()
    network.forward = lambda x: [x.permute(0, 2, 3, 1)]  # type: ignore[method-assign]
    network.output_fmt = "NHWC"  # type: ignore[assignment]
    images = torch.rand(1, 3, 4, 5)
    assert torch.equal(TimmFolder(network, gives_maps=True).last_map(images), images)
    assert not TimmFolder(network, gives_maps=False).is_channels_last


def test_folder_that_timm_cannot_load_says_why_and_leaves_no_config(tmp_path: Path) -> None:
    encoder, found = save_weights(tmp_path, {"name": "resnet18"})
    content = describe_for_timm(encoder, found.model, found.options)
    with pytest.raises(ValueError, match=r"cannot load the folder by its name: .*gave_this") as caught:
        write_timm_config(tmp_path, {**content, "model_args": {"gave_this": 1}})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="it is another network there"):
        write_timm_config(tmp_path, content, lambda _: False)
    assert not (tmp_path / TIMM_CONFIG_FILE).exists()


def test_labels_stand_where_timm_and_transformers_look(tmp_path: Path) -> None:
    encoder, found = save_weights(tmp_path, {"name": "resnet18", **COLOURS})
    content = describe_for_timm(encoder, found.model, found.options, ("bee", "cat"))
    assert content["label_names"] == ["bee", "cat"]
    assert content["num_classes"] == 2
    with pytest.raises(ValueError, match="cannot load the folder by its name"):
        write_timm_config(tmp_path, content)
    state = {**found.library_state(encoder), "fc.weight": torch.ones(2, 512), "fc.bias": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors")
    network = write_timm_config(tmp_path, content).network
    assert network.num_classes == 2
    assert network.pretrained_cfg["label_names"] == ["bee", "cat"]  # type: ignore[index]
