"""Networks of timm as encoders: their maps and class tokens are timm's own, and options are taken or refused."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder, pool_maps, pooled_size
from firstlight.tasks.nn.timm_backbones import TokenMaps, explain_masking, find_timm_traits, from_timm

VIT: dict[str, Any] = {"name": "timm", "model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4}
SMALL: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}


pytestmark = pytest.mark.usefixtures("repeated_draws")


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def with_random_norm(encoder: Encoder) -> Encoder:
    """Normalisations are 1 and 0 at first, and one that is left out would not show."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in encoder.named_parameters():
        if "norm" in name or "pos_embed" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator)
    return encoder.eval()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 4}),
        ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
        ("eva02_tiny_patch14_224", {"patch_size": 8}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
        ("mixer_s32_224", {}),
    ],
)
@torch.no_grad()
def test_maps_and_class_token_are_those_of_timm(model: str, options: dict[str, int]) -> None:
    spec = {"name": "timm", "model": model, "img_size": 32, **options}
    encoder = with_random_norm(Encoder(spec, 32))
    net: Any = timm.create_model(model, num_classes=0, img_size=32, **options).eval()
    state = {key.removeprefix("stages.net.model."): tensor for key, tensor in encoder.state_dict().items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.startswith("fc_norm")]
    tokens, maps = net.forward_features(encoder.input(images())), encoder(images())
    prefix, side = int(getattr(net, "num_prefix_tokens", 0)), 32 // options.get("patch_size", 32)
    assert maps[-1].shape[1:] == (tokens.shape[2], side, side) == encoder.shapes[-1]
    torch.testing.assert_close(maps[-1].flatten(2).mT, tokens[:, prefix:])
    if encoder.has_class_token:
        torch.testing.assert_close(pool_maps(maps, "cls"), tokens[:, 0])
    assert encoder.has_class_token == (model != "mixer_s32_224")
    assert len(maps) == len(net.blocks)


def test_a_network_of_stages_gives_what_features_only_gives() -> None:
    """The weights and the maps that encoders had before are those that they have now."""
    torch.manual_seed(5)
    body: Any = from_timm(3, model="convnext_atto")
    torch.manual_seed(5)
    net = timm.create_model("convnext_atto", features_only=True)
    assert list(body.net.state_dict()) == list(net.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(body.net.state_dict().values(), net.state_dict().values(), strict=True)
    )
    for found, expected in zip(body.eval()(images(1, 64)), net.eval()(images(1, 64)), strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_weights_of_an_earlier_version_give_the_maps_of_that_version() -> None:
    earlier = timm.create_model("test_vit", features_only=True, img_size=32).eval()
    state = {f"stages.net.{key}": tensor for key, tensor in earlier.state_dict().items()}
    assert not any(".norm." in key and "blocks" not in key for key in state), "there was no final normalisation"
    encoder = Encoder({"name": "timm", "model": "test_vit", "img_size": 32}, 32)
    encoder.load_state_dict(state)
    found = encoder.eval()(images())
    expected = earlier(encoder.input(images()))
    assert len(encoder.shapes) == len(found) == len(expected) == 3
    assert not encoder.has_class_token
    for map_, other in zip(found, expected, strict=True):
        assert torch.equal(map_, other)


def test_images_of_another_size_have_their_own_grid() -> None:
    assert Encoder(VIT, 48).shapes[-1] == (192, 12, 12)
    with pytest.raises(ValueError, match=r"cannot take images of 48 pixels: Input height .*; advised: img_size: 48$"):
        Encoder({**VIT, "dynamic_img_size": False}, 48)
    with pytest.raises(
        ValueError, match=r"^model: .* cannot take images of 30 pixels: .* divisible by patch size \(4\)"
    ):
        Encoder(VIT, 30)
    assert Encoder({"name": "timm", "model": "swin_tiny_patch4_window7_224", "img_size": 64}, 64).shapes[-1] == (
        768,
        2,
        2,
    )


@pytest.mark.parametrize(
    ("option", "model"),
    [
        ({"img_size": 64}, "resnet10t"),
        ({"patch_size": 4}, "mobilenetv3_small_050"),
        ({"dynamic_img_size": True}, "mixer_s32_224"),
        ({"img_size": 64}, "convnext_atto"),
        # Its patches have one size, though its class takes it.
        ({"patch_size": 8}, "mixer_s32_224"),
    ],
)
def test_option_that_a_network_does_not_take_is_named(option: dict[str, Any], model: str) -> None:
    (name, value), *_ = option.items()
    message = f"^{name}: {value} is not valid, since '{model}' of timm takes no {name}; valid: null$"
    with pytest.raises(ValueError, match=message):
        from_timm(3, model=model, **option)


def test_only_the_given_depth_is_computed() -> None:
    encoder, seen = Encoder(SMALL, 32).eval(), []
    stages = encoder.stages
    assert isinstance(stages, TokenMaps)
    for block in stages.model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda block, *_: seen.append(block))
    whole = encoder(images())
    seen.clear()
    two = encoder(images(), depth=2)
    assert len(seen) == 2
    assert torch.equal(two[1], whole[1])
    assert torch.equal(pool_maps(two, "cls"), pool_maps(whole, "cls", 1))


def test_two_towers_have_both_class_tokens() -> None:
    encoder = Encoder({**SMALL, "input": "rgb_sobel"}, 32).eval()
    maps = encoder(images())
    assert pool_maps(maps, "cls").shape == (2, pooled_size(encoder, "cls")) == (2, 128)
    assert pooled_size(encoder, "cls_avg") == 256
    assert len(encoder.parameter_blocks()) == 6


def test_blocks_of_parameters_are_those_of_a_vit() -> None:
    """Embeddings are the first, and the final normalisation, though every map has it, the last."""
    encoder = Encoder(VIT, 32)
    names = {parameter: name.removeprefix("stages.net.model.") for name, parameter in encoder.named_parameters()}
    blocks = [{names[parameter] for parameter in block} for block in encoder.parameter_blocks()]
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight"} < blocks[0]
    assert {name for name in blocks[0] if name.startswith("blocks")} == {
        n for n in names.values() if n.startswith("blocks.0.")
    }
    assert all(name.startswith("blocks.5.") for name in blocks[5])
    assert {"norm.weight", "norm.bias"} < blocks[-1]
    assert sum(map(len, blocks)) == len(names)


def test_filters_of_the_patch_embedding_are_shown() -> None:
    encoder = Encoder(VIT, 32)
    (filters,) = encoder.compose_first_filters()
    assert torch.equal(filters, encoder.get_parameter("stages.net.model.patch_embed.proj.weight"))


def test_missing_class_token_is_named_with_the_network() -> None:
    with pytest.raises(
        ValueError, match=r"^pool: 'cls' needs a class token, and resnet10t has none; valid: avg, flatten$"
    ):
        pooled_size(Encoder({"name": "timm", "model": "resnet10t"}, 32), "cls")


@pytest.mark.parametrize("spec", [VIT, {"name": "timm", "model": "convnext_atto"}])
def test_checkpointed_gradient_is_bit_equal(spec: dict[str, Any]) -> None:
    gradients = []
    for turned_on in (False, True):
        torch.manual_seed(0)
        encoder = Encoder({**spec, "grad_checkpointing": turned_on}, 32)
        computed: list[nn.Module] = []
        block = next(m for m in encoder.modules() if type(m).__name__ in ("Block", "ConvNeXtBlock"))
        block.register_forward_pre_hook(lambda block, *_, computed=computed: computed.append(block))
        encoder(images())[-1].square().sum().backward()
        assert len(computed) == 1 + turned_on, "the block is computed again for the gradient"
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("resnet10t", "the 14 batch normalisations of 'resnet10t' would count every batch twice"),
        ("volo_d1_224", "batch"),
    ],
)
def test_checkpointing_that_would_change_statistics_is_refused(model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^grad_checkpointing: true is not valid, since .*{reason}"):
        from_timm(3, model=model, grad_checkpointing=True)


def test_spec_of_an_earlier_version_is_that_of_today() -> None:
    """It has none of the newer keys, and null is what a missing key is compared with."""
    parameters = inspect.signature(from_timm).parameters.values()
    newer = {p.name: p.default for p in parameters if p.name not in ("c_in", "model", "norm")}
    assert newer
    assert set(newer.values()) == {None}


def test_facts_about_a_network_draw_no_random_numbers() -> None:
    find_timm_traits.cache_clear()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    traits = find_timm_traits("test_vit")
    assert torch.equal(torch.rand(1), expected)
    assert traits.is_columnar
    assert {"img_size", "patch_size", "dynamic_img_size"} < traits.parameters


def test_spec_alone_decides_the_names_and_shapes_of_the_weights(tmp_path: Path) -> None:
    small, large = (Encoder(SMALL, size).state_dict() for size in (32, 64))
    assert {key: tensor.shape for key, tensor in small.items()} == {key: tensor.shape for key, tensor in large.items()}


@pytest.mark.parametrize(
    "model",
    [
        "test_vit",
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_medium_patch16_gap_256",
        "vit_xsmall_patch16_clip_224",
    ],
)
@torch.no_grad()
def test_all_patches_visible_give_the_deepest_map(model: str) -> None:
    """Whatever the prefix is: a class token, two tokens, registers without position embeddings, or nothing."""
    encoder = with_random_norm(Encoder({"name": "timm", "model": model, "img_size": 32, "patch_size": 8}, 32))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).expand(len(images()), -1)
    assert isinstance(encoder.stages, TokenMaps)
    tokens, maps = encoder.stages.embed_visible(encoder.input(images()), order), encoder(images())
    prefix = tokens.shape[1] - 16
    torch.testing.assert_close(tokens[:, prefix:], maps[-1].flatten(2).mT[:, order[0]])
    assert explain_masking(encoder.stages) is None
    assert encoder.has_class_token == (prefix > 0)
    if prefix:
        torch.testing.assert_close(tokens[:, 0], pool_maps(maps, "cls"))


def test_no_token_but_the_visible_ones_enters_a_block() -> None:
    encoder, seen = Encoder(VIT, 32), list[tuple[int, ...]]()
    assert isinstance(encoder.stages, TokenMaps)
    block: Any = encoder.stages.model.blocks[0]  # type: ignore[index]
    block.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    visible = torch.tensor([[5, 0, 7]]).expand(len(images()), -1)
    found = encoder.stages.embed_visible(encoder.input(images()), visible)
    assert seen == [(len(images()), 4)] == [tuple(found.shape[:2])]


def test_checkpointed_gradient_of_visible_patches_is_bit_equal() -> None:
    gradients = []
    for turned_on in (False, True):
        torch.manual_seed(0)
        encoder = Encoder({**VIT, "grad_checkpointing": turned_on}, 32)
        assert isinstance(encoder.stages, TokenMaps)
        computed: list[nn.Module] = []
        block: Any = encoder.stages.model.blocks[0]  # type: ignore[index]
        block.register_forward_pre_hook(lambda block, _, computed=computed: computed.append(block))
        visible = torch.tensor([[5, 0, 7]]).expand(len(images()), -1)
        encoder.stages.embed_visible(encoder.input(images()), visible).square().sum().backward()
        assert len(computed) == 1 + turned_on
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("resnet10t", "has no tokens of one resolution"),
        ("mixer_s32_224", "has positions in its attention, or other parts that need all patches"),
        ("beit_base_patch16_224", "has positions in its attention, or other parts that need all patches"),
        ("test_vit_relpos", "has positions in its attention, or other parts that need all patches"),
        ("vit_tiny_r_s16_p8_224", "computes its tokens from more than a patch"),
    ],
)
def test_networks_that_need_all_patches_are_recognised(model: str, reason: str) -> None:
    spec = {"name": "timm", "model": model} | ({} if model == "resnet10t" else {"img_size": 64})
    assert explain_masking(Encoder(spec, 64).stages) == reason


def test_vit_with_a_forward_pass_of_its_own_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Encoder(SMALL, 32).stages
    assert isinstance(stages, TokenMaps)
    kind = type(stages.model)
    own = type("OwnPass", (kind,), {"forward_intermediates": lambda self, x: x})
    monkeypatch.setattr(stages.model, "__class__", own)
    assert explain_masking(stages) == "has positions in its attention, or other parts that need all patches"
