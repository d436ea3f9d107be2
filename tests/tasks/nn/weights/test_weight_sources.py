"""Sources of weights: tags and folders become local files, with what is known of them. Nothing here has a network."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import save_file

from firstlight.tasks.nn.weights import weight_sources
from firstlight.tasks.nn.weights.weight_sources import (
    WeightSource,
    find_default_colours,
    find_hub_model,
    find_weights,
    name_weights,
)

RESNET = {"name": "timm", "model": "resnet18"}
OWN = {"name": "resnet18"}
LITE0 = {"name": "timm", "model": "tf_efficientnet_lite0"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("timm.models._hub.download_url_to_file", refuse)


class FakeHub:
    """Repositories as folders, in place of the hub."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str, str | None]] = []

    def download(self, repository: str, name: str, revision: str | None = None, **_: object) -> str:
        self.asked.append((repository, name, revision))
        file = self.root / repository / name
        if not file.is_file():
            raise EntryNotFoundError(f"{name} is not in {repository}")
        return str(file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    monkeypatch.setattr(weight_sources, "find_unknown_host", lambda address: None)
    return fake


def write_model(folder: Path, file: str = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({"a": torch.ones(1)}, folder / file)
    else:
        torch.save({"a": torch.ones(1)}, folder / file)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


PRETRAINED = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "license": "mit"}


def test_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    assert find_weights(str(file), OWN) == WeightSource(str(file), file)


@pytest.mark.parametrize("source", ["{}", "local-dir:{}"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "weights_of_mine.pth"])
def test_folder_of_timm_says_what_its_weights_expect(tmp_path: Path, source: str, file: str) -> None:
    folder = write_model(
        tmp_path / "m", file, architecture="resnet18", pretrained_cfg={**PRETRAINED, "input_size": [3, 160, 160]}
    )
    found = find_weights(source.format(folder), OWN)
    assert found.path == folder / file
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (found.licence, found.interpolation, found.image_size) == ("mit", "bicubic", 160)


def test_export_of_this_project_is_found_with_its_normalisation(tmp_path: Path) -> None:
    write_model(tmp_path / "export" / "timm")
    encoder = write_model(tmp_path / "export" / "safetensors", "encoder.safetensors")
    spec = {"name": "resnet18", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (encoder / "encoder.json").write_text(json.dumps({"spec": spec, "image_size": 32}))
    found = find_weights(str(tmp_path / "export"), OWN)
    assert found.path == encoder / "encoder.safetensors"
    assert (found.mean, found.std, found.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 32)
    spec["normalize"] = "image"
    (encoder / "encoder.json").write_text(json.dumps({"spec": spec, "image_size": 32}))
    assert find_weights(str(tmp_path / "export"), OWN).mean is None, "each image is normalised by itself"


def test_folder_of_transformers_has_its_normalisation_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "pytorch_model.bin", model_type="vit", hidden_size=192)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    assert find_weights(str(folder), OWN).std == (0.25,) * 3


@pytest.mark.parametrize(
    "config", [{"mean": [0.5, "x", 0.1]}, {"mean": [float("nan")] * 3}, {"mean": 3, "std": [0, 1, 1]}, {"license": 7}]
)
def test_senseless_facts_are_left_out(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "m", architecture="x", pretrained_cfg=config)
    assert find_weights(str(folder), OWN) == WeightSource(str(folder), folder / "model.safetensors")


def test_folder_without_or_with_several_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has 0 files of weights, and none of encoder.safetensors, .*; valid: the file"
    ):
        find_weights(str(tmp_path), OWN)
    write_model(write_model(tmp_path, "a.pth"), "b.pth")
    with pytest.raises(ValueError, match=r"has 2 files of weights"):
        find_weights(str(tmp_path), OWN)
    for source in (str(tmp_path / "absent.pth"), "resnet18", f"local-dir:{tmp_path}/absent"):
        with pytest.raises(ValueError, match=r"does not exist; valid: a file or folder, timm, timm:TAG, torchvision, "):
            find_weights(source, OWN)


def test_colours_that_weights_of_a_network_usually_expect() -> None:
    mean, std, words = find_default_colours(LITE0) or ((), (), "")
    assert (mean, std, words) == ((0.5,) * 3, (0.5,) * 3, "timm's tf_efficientnet_lite0")
    for spec in (OWN, {"name": "torchvision", "model": "swin_t"}, RESNET):
        assert (find_default_colours(spec) or ((), ()))[0] == (0.485, 0.456, 0.406)
    assert find_default_colours({"name": "convnet"}) is None


@pytest.mark.parametrize("spec", [RESNET, OWN])
@pytest.mark.parametrize(
    ("source", "repository"),
    [
        ("timm:a1_in1k", "timm/resnet18.a1_in1k"),
        ("timm:resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("timm", "timm/resnet18.a1_in1k"),
    ],
)
def test_tag_of_timm_is_downloaded_from_the_hub(
    hub: FakeHub, spec: dict[str, Any], source: str, repository: str
) -> None:
    folder = write_model(hub.root / repository, "pytorch_model.bin")
    found = find_weights(source, spec)
    assert found.path == folder / "pytorch_model.bin"
    assert [name for _, name, _ in hub.asked] == ["model.safetensors", "pytorch_model.bin"]
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.licence == timm.get_pretrained_cfg("resnet18.a1_in1k").license


def test_repository_of_the_hub_has_its_description(hub: FakeHub) -> None:
    write_model(hub.root / "me/net", architecture="resnet18", pretrained_cfg=PRETRAINED)
    found = find_weights("hf-hub:me/net@v2", OWN)
    assert found.path == hub.root / "me/net/model.safetensors"
    assert found.licence == "mit"
    assert {revision for _, _, revision in hub.asked} == {"v2"}
    (hub.root / "me/net/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^'hf-hub:me/net': me/net has none of model.safetensors, pytorch_model.bin"):
        find_weights("hf-hub:me/net", OWN)


def test_torchvision_s_weights_are_downloaded_from_their_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls: list[str] = []

    def download(url: str, file: str, *_: object, **__: object) -> None:
        urls.append(url)
        torch.save({"a": torch.ones(1)}, file)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("timm.models._hub.download_url_to_file", download)
    for source in ("torchvision:ResNet18_Weights.IMAGENET1K_V1", "torchvision"):
        found = find_weights(source, OWN)
        assert found.path.parent == tmp_path / "hub" / "checkpoints"
        assert found.image_size == 224
        assert found.std == (0.229, 0.224, 0.225)
    assert urls == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"], "the second one was there"


@pytest.mark.parametrize(
    ("source", "spec", "reason"),
    [
        ("timm:a9_in99k", RESNET, r"is unknown to timm; valid: timm:a1_in1k, "),
        ("timm:resnet50.a1_in1k", RESNET, "has weights of 'resnet50', and the encoder is 'resnet18'"),
        ("timm", {"name": "convnet"}, "timm has no network like encoder.name: convnet"),
        ("timm", {"name": "torchvision", "model": "swin_t"}, r"encoder.name: torchvision \('swin_t'\)"),
        ("torchvision:ResNet50_Weights.IMAGENET1K_V1", OWN, "has no weights of 'resnet18'; valid: torchvision:"),
        ("torchvision:Nothing.V1", OWN, "valid: torchvision:ResNet18_Weights.IMAGENET1K_V1"),
        ("torchvision", RESNET, "torchvision has no network like"),
        ("timm", {"name": "timm", "model": "test_resnet_unknown"}, "unknown|no weights"),
    ],
)
def test_tag_that_does_not_fit_is_a_one_line_error(source: str, spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        find_weights(source, spec)
    assert str(caught.value).startswith(repr(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [OfflineModeIsEnabled("HF_HUB_OFFLINE=1 is set"), OSError("No space left\non device"), RuntimeError("")],
    ids=["offline", "disk", "nameless"],
)
def test_failed_download_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(weight_sources, "find_unknown_host", lambda address: None)
    for source in ("timm:a1_in1k", "hf-hub:me/net"):
        with pytest.raises(
            ValueError, match=r"^'.*' cannot be downloaded: .*; valid offline: a file or folder$"
        ) as caught:
            find_weights(source, RESNET)
        assert "\n" not in str(caught.value)


def test_without_a_network_the_cache_is_used_or_the_host_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise AssertionError("the hub's client would try again for minutes")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weight_sources, "find_unknown_host", lambda address: "huggingface.co")
    cached: dict[str, Path] = {}
    monkeypatch.setattr(weight_sources, "find_cached_file", lambda name, names, revision: cached.get(name))
    with pytest.raises(
        ValueError, match=r"^'timm:a1_in1k' cannot be downloaded: this machine cannot find huggingface\.co; "
    ):
        find_weights("timm:a1_in1k", RESNET)
    cached["timm/resnet18.a1_in1k"] = write_model(tmp_path) / "model.safetensors"
    assert find_weights("timm:a1_in1k", RESNET).path == tmp_path / "model.safetensors"


def test_hub_that_is_turned_off_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's own client, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^'hf-hub:me/net' cannot be downloaded: .+; valid offline: a file or folder$"
    ):
        find_weights("hf-hub:me/net", OWN)


def test_address_that_cannot_be_reached_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"^'torchvision' cannot be downloaded: "):
        find_weights("torchvision", OWN)


def test_weights_that_only_their_own_reader_knows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(has_weights=True, custom_load=True, to_dict=dict)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: config)
    with pytest.raises(ValueError, match=r"these weights are not stored as a state dict"):
        find_weights("timm:a1_in1k", RESNET)


@pytest.mark.parametrize(
    ("source", "spec", "name", "model"),
    [
        ("/home/me/w.pth", {"name": "resnet18"}, "w.pth", None),
        ("local-dir:/home/me/export", {"name": "resnet18"}, "export", None),
        ("timm", {"name": "resnet18"}, "timm:resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("timm:a2_in1k", {"name": "resnet18"}, "timm:resnet18.a2_in1k", "timm/resnet18.a2_in1k"),
        ("timm:resnet18.a2_in1k", {"name": "resnet18"}, "timm:resnet18.a2_in1k", "timm/resnet18.a2_in1k"),
        ("timm:none", {"name": "resnet18"}, "timm:resnet18.none", None),
        ("timm", {"name": "alexnet"}, "timm", None),
        ("torchvision", {"name": "resnet18"}, "torchvision:ResNet18_Weights.IMAGENET1K_V1", None),
        ("hf-hub:owner/name@v1", {"name": "resnet18"}, "hf-hub:owner/name@v1", "owner/name"),
        ("hf-hub:owner", {"name": "resnet18"}, "hf-hub:owner", None),
        ("runs:/1/encoder", {"name": "resnet18"}, "runs:/1/encoder", None),
    ],
)
def test_source_is_named_as_anybody_knows_it(source: str, spec: dict[str, Any], name: str, model: str | None) -> None:
    assert name_weights(source, spec) == name
    assert find_hub_model(name) == model


def test_licence_of_earlier_weights_is_handed_on(tmp_path: Path) -> None:
    origin: Any = {"licence": "cc-by-4.0", "sha256": "ab"}
    (tmp_path / "encoder.safetensors").write_bytes(b"x")
    for weights, licence in ((origin, "cc-by-4.0"), ({"licence": 3}, None), ("text", None)):
        (tmp_path / "encoder.json").write_text(json.dumps({"spec": {"name": "resnet18"}, "weights": weights}))
        assert find_weights(str(tmp_path), {"name": "resnet18"}).licence == licence
