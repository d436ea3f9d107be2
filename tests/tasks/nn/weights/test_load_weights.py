"""Weights in the layouts of others, loaded into encoders: the features are then those of the network they come from."""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from firstlight.tasks.downstream.knn import weighted_knn
from firstlight.tasks.nn.encoders import Encoder, pool_maps
from firstlight.tasks.nn.weights.load_weights import LoadedWeights, load_weights
from firstlight.tasks.nn.weights.weight_sources import WeightSource
from tests.support.paths import SHARED

SIZE = 32
LITE0 = SHARED / "data" / "weights" / "tf_efficientnet_lite0.safetensors"
LITE0_SPEC: dict[str, Any] = {"name": "timm", "model": "tf_efficientnet_lite0", "mean": (0.5,) * 3, "std": (0.5,) * 3}
RESNET: dict[str, Any] = {"name": "resnet18"}
SMALL_RESNET: dict[str, Any] = {"name": "timm", "model": "test_resnet"}
VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": SIZE, "patch_size": 8}


# No weight is one that was drawn: each is loaded, or only its place matters.
pytestmark = pytest.mark.usefixtures("repeated_draws")


def images(count: int = 2, size: int = SIZE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def trained(net: nn.Module, channels: int = 3, size: int = 32) -> Any:
    """A network whose running statistics and normalisations are not those of a new one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name or "bn" in name or "pos_embed" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
        net.train()(torch.rand(2, channels, size, size, generator=generator))
    return net.eval()


@cache
def train_resnet18(classes: int) -> Any:
    torch.manual_seed(1)
    return trained(torchvision.models.resnet18(num_classes=classes))


def resnet18(classes: int = 1000) -> Any:
    return copy.deepcopy(train_resnet18(classes))


def list_resnet18_tensors() -> dict[str, Tensor]:
    """Returns those of the network that all tests share."""
    return dict(train_resnet18(1000).state_dict())


def small_resnet(classes: int = 1000) -> Any:
    torch.manual_seed(1)
    return trained(timm.create_model("test_resnet", num_classes=classes))


def small_vit(**options: Any) -> Any:
    torch.manual_seed(1)
    return trained(timm.create_model("test_vit", **{"img_size": SIZE, "patch_size": 8, **options}), size=SIZE)


def load(content: Any, encoder: Encoder, folder: Path, part: str | None = None) -> LoadedWeights:
    torch.save(content, folder / "w.pth")
    return load_weights(encoder, WeightSource("w.pth", folder / "w.pth"), part)


def build(spec: dict[str, Any], size: int = SIZE) -> Encoder:
    torch.manual_seed(2)
    return Encoder(spec, size)


def prefixed(prefix: str, net: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def others_like(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.float() * 0.9 for name, tensor in net.state_dict().items()}


# Ten layouts: the content of a file, the part and the prefix that are told.
RESNET_LAYOUTS: dict[str, tuple[Callable[[nn.Module], Any], str, str]] = {
    "as it is": (lambda net: net.state_dict(), "", ""),
    "DistributedDataParallel": (lambda net: prefixed("module.", net), "", "module."),
    "Lightning": (
        lambda net: {
            "epoch": 9,
            "global_step": 90,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": prefixed("model.backbone.", net) | {"model.head.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [{"state": {}}],
        },
        "state_dict",
        "model.backbone.",
    ),
    "MoCo": (
        lambda net: {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": prefixed("module.encoder_q.", net)
            | {f"module.encoder_k.{name}": tensor for name, tensor in others_like(net).items()}
            | {"module.queue": torch.ones(128, 9)},
        },
        "state_dict",
        "module.encoder_q.",
    ),
    "DINO": (
        lambda net: {
            "student": {f"module.backbone.{name}": tensor for name, tensor in others_like(net).items()},
            "teacher": prefixed("backbone.", net) | {"head.mlp.0.weight": torch.ones(4, 4)},
            "epoch": 3,
        },
        "teacher",
        "backbone.",
    ),
    "torch.compile": (lambda net: {"model": prefixed("_orig_mod.", net)}, "model", ""),
    "torch.compile of DistributedDataParallel": (lambda net: prefixed("module._orig_mod.", net), "", "module."),
    "model": (lambda net: {"model": net.state_dict(), "optimizer": {}, "epoch": 1}, "model", ""),
    "half precision, without counts": (
        lambda net: {n: t.half() for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")},
        "",
        "",
    ),
}


OTHERS: list[dict[str, Any]] = [{"name": library, "model": "resnet18"} for library in ("timm", "torchvision")]
# The other layouts differ in parts and prefixes alone, which the names of any network show.
WITH_RESNET18 = ("as it is", "Lightning", "half precision, without counts")


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        *((layout, RESNET if layout in WITH_RESNET18 else SMALL_RESNET) for layout in RESNET_LAYOUTS),
        *(("Lightning", spec) for spec in OTHERS),
    ],
)
@torch.no_grad()
def test_foreign_layouts_give_the_features_of_their_network(tmp_path: Path, layout: str, spec: dict[str, Any]) -> None:
    net = small_resnet(7) if spec == SMALL_RESNET else resnet18(7)
    pack, part, prefix = RESNET_LAYOUTS[layout]
    encoder = build(spec)
    loaded = load(pack(net), encoder, tmp_path)
    net.fc = nn.Identity()
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if "half" in layout else {"rtol": 1e-5, "atol": 1e-5}
    expected = net(encoder.input(images()))
    torch.testing.assert_close(pool_maps(encoder.eval()(images()), "avg"), expected, **tolerance)
    assert (loaded.part, loaded.prefix) == (part, prefix)
    assert {"fc.weight", "fc.bias"} <= set(loaded.left_out)
    assert (len(loaded.kept) == 20) == ("counts" in layout)
    assert loaded.layout in ("torchvision", "timm")
    assert "\n" not in loaded.describe()


def test_other_loadable_parts_of_a_checkpoint_are_reported(tmp_path: Path) -> None:
    net = resnet18()
    loaded = load(RESNET_LAYOUTS["MoCo"][0](net), build(RESNET), tmp_path)
    assert loaded.others == ("module.encoder_k.",)
    assert "not taken: 'module.encoder_k.'" in loaded.describe()
    student = load(RESNET_LAYOUTS["DINO"][0](net), build(RESNET), tmp_path, part="student")
    assert (student.part, student.prefix, student.others) == ("student", "module.backbone.", ("teacher",))


@pytest.mark.parametrize("spec", [{"name": "densenet121"}, {"name": "torchvision", "model": "densenet121"}])
@torch.no_grad()
def test_torchvision_s_old_names_of_dense_layers_are_known(tmp_path: Path, spec: dict[str, Any]) -> None:
    torch.manual_seed(1)
    net = trained(torchvision.models.densenet121())
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor
        for name, tensor in net.state_dict().items()
    }
    assert old.keys() != net.state_dict().keys()
    encoder = build(spec)
    load(old, encoder, tmp_path)
    expected = net.features(encoder.input(images())).relu()
    torch.testing.assert_close(encoder.eval()(images())[-1], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_colours_are_summed_for_gray_images(tmp_path: Path) -> None:
    net, encoder = resnet18(), build({**RESNET, "input": "gray"})
    loaded = load(net.state_dict(), encoder, tmp_path)
    assert loaded.adapted == ("conv1.weight",)
    gray = encoder.input(images())
    net.fc = nn.Identity()
    torch.testing.assert_close(
        pool_maps(encoder.eval()(images()), "avg"), net(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_weights_for_gray_images_take_the_mean_of_the_colours(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = trained(timm.create_model("test_resnet", in_chans=1, num_classes=0), channels=1)
    encoder = build(SMALL_RESNET)
    assert load(net.state_dict(), encoder, tmp_path).adapted == ("conv1.0.weight",)
    expected = net(encoder.input(images()).mean(1, keepdim=True))
    torch.testing.assert_close(pool_maps(encoder.eval()(images()), "avg"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sobel", "rgb_sobel"])
def test_input_without_colours_is_refused(tmp_path: Path, kind: str) -> None:
    encoder = build({**RESNET, "input": kind})
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    message = "encoder.input: sobel gives 2; valid: rgb, gray" if kind == "sobel" else "has no tensor of resnet18"
    with pytest.raises(ValueError, match=message):
        load(list_resnet18_tensors(), encoder, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("kind", ["sobel", "rgb_sobel", "high_pass"])
def test_weights_of_an_encoder_of_this_project_fit_it(tmp_path: Path, kind: str) -> None:
    spec = {"name": "convnet", "width": 4, "depth": 2, "input": kind, "norm": "group"}
    torch.manual_seed(5)
    saved = Encoder(spec, SIZE)
    save_file(saved.state_dict(), tmp_path / "encoder.safetensors")
    encoder = build(spec)
    loaded = load_weights(encoder, WeightSource("e", tmp_path / "encoder.safetensors"))
    assert (loaded.layout, loaded.left_out, loaded.kept) == ("firstlight", (), ())
    assert torch.equal(encoder(images())[-1], saved(images())[-1])


@pytest.mark.parametrize("norm", ["batch", "sync"])
@torch.no_grad()
def test_synchronised_normalisation_takes_the_statistics(tmp_path: Path, norm: str) -> None:
    torch.manual_seed(1)
    net = trained(timm.create_model("mobilenetv3_small_050"))
    encoder = build({"name": "timm", "model": "mobilenetv3_small_050", "norm": norm}, 64)
    load(net.state_dict(), encoder, tmp_path)
    x = images(2, 64)
    expected = net.forward_intermediates(encoder.input(x), intermediates_only=True)[-1]
    torch.testing.assert_close(encoder.eval()(x)[-1], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_vit_of_its_own_size_is_loaded_as_it_is(tmp_path: Path) -> None:
    net, encoder = small_vit(num_classes=5), build(VIT)
    loaded = load({"model": net.state_dict()}, encoder, tmp_path)
    assert (loaded.resampled, loaded.left_out) == ((), ("head.bias", "head.weight"))
    tokens, maps = net.forward_features(encoder.input(images())), encoder.eval()(images())
    torch.testing.assert_close(pool_maps(maps, "cls"), tokens[:, 0])


@torch.no_grad()
def test_position_and_patch_embeddings_are_resampled_as_timm_does(tmp_path: Path) -> None:
    net = small_vit(img_size=64, patch_size=16)
    encoder = build(VIT)
    loaded = load(net.state_dict(), encoder, tmp_path)
    assert loaded.resampled == ("patch_embed.proj.weight",), "four positions a side in both"
    encoder = build({**VIT, "img_size": 48})
    loaded = load(net.state_dict(), encoder, tmp_path)
    assert loaded.resampled == ("patch_embed.proj.weight", "pos_embed")
    expected: Any = timm.create_model(
        "test_vit",
        pretrained=True,
        num_classes=0,
        img_size=48,
        patch_size=8,
        pretrained_cfg_overlay={"state_dict": net.state_dict(), "num_classes": 1000},
    ).eval()
    tokens = expected.forward_features(encoder.input(images(2, 48)))
    torch.testing.assert_close(pool_maps(encoder.eval()(images(2, 48)), "cls"), tokens[:, 0])


@torch.no_grad()
def test_swin_takes_tables_of_another_window(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = timm.create_model("swin_tiny_patch4_window7_224")
    encoder = build({"name": "timm", "model": "swin_tiny_patch4_window7_224", "img_size": 64}, 64)
    weight = encoder.get_parameter("stages.net.layers_0.blocks.0.mlp.fc1.weight")
    before = weight.clone()
    loaded = load(net.state_dict(), encoder, tmp_path)
    assert any(name.endswith("relative_position_bias_table") for name in loaded.resampled)
    assert not torch.equal(weight, before)


@torch.no_grad()
def test_vit_of_transformers_gives_timm_s_features(tmp_path: Path) -> None:
    """The names of transformers' ViTModel, written from timm's."""
    net, encoder = small_vit(num_classes=0), build(VIT)
    own = net.state_dict()
    content = {
        "vit.embeddings.cls_token": own["cls_token"],
        "vit.embeddings.position_embeddings": own["pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": own["patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": own["patch_embed.proj.bias"],
        "vit.layernorm.weight": own["norm.weight"],
        "vit.layernorm.bias": own["norm.bias"],
        "classifier.weight": torch.ones(9, 64),
    }
    pairs = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    pairs |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    for k in range(6):
        for kind in ("weight", "bias"):
            here, there = f"blocks.{k}", f"vit.encoder.layer.{k}"
            content |= {f"{there}.{new}.{kind}": own[f"{here}.{old}.{kind}"] for old, new in pairs.items()}
            thirds = own[f"{here}.attn.qkv.{kind}"].chunk(3)
            names = ("query", "key", "value")
            content |= {
                f"{there}.attention.attention.{n}.{kind}": t.clone() for n, t in zip(names, thirds, strict=True)
            }
            content |= {
                f"{there}.layer_scale{i}.lambda1": own[f"{here}.ls{i}.gamma"]
                for i in (1, 2)
                if f"{here}.ls{i}.gamma" in own
            }
    load(content, encoder, tmp_path)
    tokens = net.forward_features(encoder.input(images()))
    torch.testing.assert_close(pool_maps(encoder.eval()(images()), "cls"), tokens[:, 0])


@torch.no_grad()
def test_vit_of_clip_gives_timm_s_features(tmp_path: Path) -> None:
    """The names of OpenAI's CLIP, none of which is one of timm's, and which its text encoder stands beside."""
    net, encoder = small_vit(num_classes=0), build({**VIT, "norm": "group"})
    swaps = [("patch_embed.proj", "conv1"), ("blocks.", "transformer.resblocks."), ("attn.qkv.", "attn.in_proj_")]
    swaps += [("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), (".norm", ".ln_")]
    content = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(())}
    for name, tensor in net.state_dict().items():
        shape = {"cls_token": (64,), "pos_embed": (17, 64)}.get(name, tensor.shape)
        there = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(name, name)
        there = re.sub(r"^norm\.", "ln_post.", there)
        for old, new in swaps:
            there = there.replace(old, new)
        content[f"visual.{there}"] = tensor.reshape(shape).clone()
    load(content, encoder, tmp_path)
    tokens = net.forward_features(encoder.input(images()))
    torch.testing.assert_close(pool_maps(encoder.eval()(images()), "cls"), tokens[:, 0])


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


BROKEN: dict[str, tuple[dict[str, Any], Callable[[], Any], str]] = {
    "another network": (
        RESNET,
        lambda: small_vit().state_dict(),
        "has no tensor of resnet18: the file has 'cls_token'",
    ),
    "a deeper network": (
        RESNET,
        lambda: torchvision.models.resnet34().state_dict(),
        r"does not fit resnet18: of its 120 tensors \d+ belong to layers that it lacks, first "
        r"'layer1.2.conv1.weight' \(64, 64, 3, 3\)",
    ),
    "a wider network": (
        RESNET,
        lambda: torchvision.models.resnet50().state_dict(),
        r"\d+ have another shape, first 'layer1.0.conv1.weight' \(64, 64, 1, 1\) instead of \(64, 64, 3, 3\)",
    ),
    "a missing layer": (
        RESNET,
        lambda: without(list_resnet18_tensors(), "conv1.weight", "layer4.1.bn2.running_var"),
        r"2 are missing, first 'conv1.weight' \(64, 3, 7, 7\), 'layer4.1.bn2.running_var' \(512,\)$",
    ),
    "another stem": (
        {**RESNET, "stem": "cifar"},
        lambda: list_resnet18_tensors(),
        r"1 have another shape, first 'conv1.weight' \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)$",
    ),
    "group normalisation": ({**RESNET, "norm": "group"}, lambda: list_resnet18_tensors(), "has no tensor of resnet18"),
    "numbers that are not finite": (
        SMALL_RESNET,
        lambda: small_resnet().state_dict() | {"conv1.3.weight": torch.full((16, 16, 3, 3), torch.nan)},
        "'conv1.3.weight' has numbers that are not finite$",
    ),
    "integers": (
        SMALL_RESNET,
        lambda: small_resnet().state_dict() | {"conv1.0.weight": torch.ones(16, 3, 3, 3, dtype=torch.int8)},
        r"'conv1.0.weight' has numbers of type torch.int8; valid: torch.float32 and the like$",
    ),
    "numbers too large": (
        SMALL_RESNET,
        lambda: {n: t * 1e30 if t.ndim == 4 else t for n, t in small_resnet().state_dict().items()},
        "the feature maps of an image of noise are not finite with these weights$",
    ),
    "a ViT of another width": (
        VIT,
        lambda: timm.create_model("test_vit2", img_size=SIZE, patch_size=8).state_dict(),
        "does not fit test_vit: of its|timm cannot convert",
    ),
    "a deeper ViT": (
        VIT,
        lambda: small_vit().state_dict() | {"blocks.6.norm1.weight": torch.ones(64)},
        r"1 belong to layers that it lacks, first 'blocks.6.norm1.weight' \(64,\)$",
    ),
    "positions that are no square": (
        VIT,
        lambda: small_vit().state_dict() | {"pos_embed": torch.ones(1, 1 + 7, 64)},
        "timm cannot convert these weights|have another shape",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_do_not_fit_leave_the_encoder_and_are_one_line(tmp_path: Path, name: str) -> None:
    spec, content, reason = BROKEN[name]
    encoder = build(spec)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=reason) as caught:
        load(content(), encoder, tmp_path)
    assert str(caught.value).startswith("'w.pth'")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    assert encoder.training


def test_a_head_may_have_numbers_that_are_not_finite(tmp_path: Path) -> None:
    state = small_resnet().state_dict() | {"fc.bias": torch.full((1000,), torch.inf)}
    assert "fc.bias" in load(state, build(SMALL_RESNET), tmp_path).left_out


def test_loading_draws_no_random_numbers_and_keeps_what_is_frozen(tmp_path: Path) -> None:
    encoder = build(SMALL_RESNET)
    frozen = encoder.get_parameter("stages.net.conv1.0.weight").requires_grad_(False)
    state = small_resnet().state_dict()
    torch.manual_seed(8)
    expected = torch.rand(1)
    torch.manual_seed(8)
    load(state, encoder, tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert encoder.training
    assert not frozen.requires_grad
    assert torch.equal(frozen, state["conv1.0.weight"])


def open_photograph(file: Path, size: int) -> Tensor:
    """The centre of an image in 0..1, its shorter side scaled to `size`."""
    image = Image.open(file).convert("RGB")
    scale = size / min(image.size)
    image = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return torch.from_numpy(np.asarray(image.crop((left, top, left + size, top + size))).copy()).permute(2, 0, 1) / 255


needs_weights = pytest.mark.skipif(not LITE0.is_file(), reason="the weights in shared/data/weights are not here")


@needs_weights
@torch.no_grad()
def test_efficientnet_s_features_of_photographs_are_timm_s() -> None:
    encoder = build(LITE0_SPEC, 128)
    loaded = load_weights(encoder, WeightSource(str(LITE0), LITE0))
    assert (len(loaded.loaded), {name.split(".")[0] for name in loaded.left_out}) == (
        288,
        {"conv_head", "bn2", "classifier"},
    )
    net: Any = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(LITE0)).eval()
    photographs = torch.stack([open_photograph(f, 128) for f in sorted((SHARED / "data/photos").glob("*"))[:8]])
    expected = net.forward_intermediates((photographs - 0.5) / 0.5, intermediates_only=True)[-1]
    torch.testing.assert_close(encoder.eval()(photographs)[-1], expected, rtol=1e-6, atol=1e-6)


def read_flowers(part: str) -> tuple[Tensor, Tensor]:
    classes = sorted(folder for folder in (SHARED / "data/flowers" / part).iterdir() if folder.is_dir())
    pairs = [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())[:8]]
    return torch.stack([open_photograph(file, 64) for file, _ in pairs]), torch.tensor([label for _, label in pairs])


@needs_weights
@torch.no_grad()
def test_neighbours_of_flowers_are_far_better_than_with_random_weights() -> None:
    (bank, labels), (queries, truth) = read_flowers("train"), read_flowers("test")
    found = []
    for with_weights in (False, True):
        encoder = build(LITE0_SPEC, 64)
        if with_weights:
            load_weights(encoder, WeightSource(str(LITE0), LITE0))
        encoder.eval()
        rows = [torch.cat([pool_maps(encoder(part), "avg") for part in x.split(60)]) for x in (queries, bank)]
        found.append(float((weighted_knn(*rows, labels, 10, 0.1) == truth).double().mean()))
    assert found[1] > found[0] + 0.3, found
