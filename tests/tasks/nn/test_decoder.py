import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from firstlight.tasks.nn.decoder import Decoder, Shortcuts, TokenDecoder, deconvolution_geometry, encode_positions
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import BatchNorm, SyncBatchNorm
from tests.support import references_masked


def autoencoder(
    spec: dict[str, Any], size: int, shortcuts: Shortcuts = "full", norm: str = "group"
) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder = Encoder(spec, size)
    return encoder, Decoder(
        encoder.shapes, encoder.input.channels, size, shortcuts=shortcuts, norm=norm, init="default"
    )  # type: ignore[arg-type]


def convnet(size: int = 16, depth: int = 4, shortcuts: Shortcuts = "full") -> tuple[Encoder, Decoder]:
    return autoencoder({"name": "convnet", "norm": "group", "width": 4, "depth": depth}, size, shortcuts)


def network1(blocks: tuple[int, ...], size: int, width: int = 4) -> tuple[Encoder, Decoder]:
    return autoencoder({"name": "network1", "m": blocks, "width": width, "norm": "group"}, size)


def reconstructed(encoder: Encoder, decoder: Decoder, size: int, count: int = 1) -> Tensor:
    images = torch.rand(count, 3, size, size)
    out: Tensor = decoder(encoder(images), encoder.input(images))
    return out


@given(st.integers(1, 64), st.integers(1, 64))
def test_deconvolution_reaches_every_position_of_any_size(a: int, b: int) -> None:
    small, large = sorted((a, b))
    kernel, stride, padding, extra = deconvolution_geometry(small, large)
    ones = torch.ones(1, 1, small), torch.ones(1, 1, kernel)
    reached = F.conv_transpose1d(*ones, stride=stride, padding=padding, output_padding=extra)
    assert reached.shape[2] == large
    assert (reached > 0).all()


@pytest.mark.parametrize("size", [*range(2, 40), 45, 57, 89, 113, 225, 224])
def test_the_mirror_of_a_3x3_convolution_is_3x3(size: int) -> None:
    assert deconvolution_geometry(size, size) == (3, 1, 1, 0)
    halved = (size + 1) // 2
    assert deconvolution_geometry(halved, size) == (3, 2, 1, 1 - size % 2)


SPECS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"name": "convnet", "width": 2, "depth": 3}, (29, 30, 32, 33, 8)),
    ({"name": "convnet", "width": 2, "depth": 1}, (29,)),
    ({"name": "convnet", "width": 2, "depth": 3, "input": "gray"}, (29,)),
    ({"name": "alexnet", "stem": "cifar"}, (29, 32)),
    ({"name": "alexnet"}, (89,)),
    ({"name": "resnet18"}, (33, 64)),
    ({"name": "resnet18", "stem": "cifar"}, (29,)),
]


@pytest.mark.parametrize(("spec", "size"), [(spec, size) for spec, sizes in SPECS for size in sizes], ids=str)
@torch.no_grad()
def test_every_encoder_is_mirrored(spec: dict[str, Any], size: int) -> None:
    encoder, decoder = autoencoder(spec, size, norm="batch")
    encoder.eval()
    decoder.eval()
    assert reconstructed(encoder, decoder, size).shape == (1, encoder.input.channels, size, size)
    assert len(decoder.deconvolutions) + 1 == len(encoder.shapes)


def layers(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


@pytest.mark.parametrize(
    ("blocks", "size"),
    [((5, 5, 5, 0), 29), ((5, 5, 5, 0), 30), ((5, 5, 5, 0), 32), ((5, 5, 5, 0), 33), ((3, 3, 4, 5), 89)],
    ids=str,
)
@torch.no_grad()
def test_the_papers_30_layer_auto_encoders(blocks: tuple[int, ...], size: int) -> None:
    """Sections 4.1 and 4.2.3: 15 convolutions and 15 deconvolutions, all 3x3.

    There is a shortcut every two layers, and one from the input to the output.
    """
    encoder, decoder = network1(blocks, size)
    deconvolutions = layers(decoder, nn.ConvTranspose2d)
    assert len(layers(encoder, nn.Conv2d)) == len(deconvolutions) == 15
    assert all(layer.kernel_size == (3, 3) for layer in deconvolutions)
    assert list(decoder.joined) == [2, 4, 6, 8, 10, 12, 14]
    assert reconstructed(encoder, decoder, size).shape == (1, 3, size, size)


@torch.no_grad()
def test_network_2_of_the_paper() -> None:
    encoder, decoder = autoencoder({"name": "network2"}, 225, norm="batch")
    assert len(layers(encoder, nn.Conv2d)) == len(layers(decoder, nn.ConvTranspose2d)) == 13
    encoder.eval()
    decoder.eval()
    assert reconstructed(encoder, decoder, 225).shape == (1, 3, 225, 225)


@pytest.mark.parametrize("shortcuts", ["input_output", "full"])
def test_without_deconvolutions_the_input_comes_back(shortcuts: Shortcuts) -> None:
    encoder, decoder = convnet(shortcuts=shortcuts)
    for layer in layers(decoder, nn.ConvTranspose2d):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    normalised = encoder.input(torch.rand(2, 3, 16, 16))
    assert torch.equal(decoder(encoder(torch.rand(2, 3, 16, 16)), normalised), normalised)


@pytest.mark.parametrize(("shortcuts", "joined"), [("none", []), ("input_output", []), ("full", [2, 4])])
def test_output_depends_on_the_maps_of_the_shortcuts(shortcuts: Shortcuts, joined: list[int]) -> None:
    """With a deconvolution of zeros before a sum, only the shortcut carries the maps above it.

    This counts the shortcuts that are computed, not those that are declared.
    """
    _, decoder = convnet(size=64, depth=5, shortcuts=shortcuts)
    maps = [torch.rand(1, *shape).requires_grad_() for shape in decoder.spec["shapes"]]
    image = torch.rand(1, 3, 64, 64).requires_grad_()
    reconstruction = decoder(maps, image)
    gradients = torch.autograd.grad(reconstruction.square().sum(), [*maps, image], allow_unused=True)
    reached = [number for number, gradient in enumerate(gradients[:-1], 1) if gradient is not None]
    assert reached == [*joined, 5]
    assert (gradients[-1] is not None) == (shortcuts != "none")


@pytest.mark.parametrize("shortcuts", ["none", "input_output", "full"])
def test_the_network_is_that_of_the_paper_layer_by_layer(shortcuts: Shortcuts) -> None:
    encoder, decoder = convnet(shortcuts=shortcuts)
    images = torch.rand(2, 3, 16, 16)
    m1, m2, m3, m4 = encoder(images)
    d4, d3, d2 = decoder.deconvolutions
    n4, n3, n2 = decoder.norms
    x = F.relu(n4(d4(m4)))
    x = F.relu(n3(d3(x)) + m2) if shortcuts == "full" else F.relu(n3(d3(x)))
    x = F.relu(n2(d2(x)))
    assert x.shape == m1.shape
    assert m3.shape == (2, 16, 2, 2)
    assert torch.equal(decoder.compute_features([m1, m2, m3, m4]), x)
    expected = decoder.last(x) + (0 if shortcuts == "none" else encoder.input(images))
    torch.testing.assert_close(decoder([m1, m2, m3, m4], encoder.input(images)), expected)


def test_the_output_may_be_negative() -> None:
    encoder, decoder = convnet(shortcuts="none")
    assert reconstructed(encoder, decoder, 16, 8).min() < 0


@pytest.mark.parametrize("shortcuts", ["none", "input_output", "full"])
def test_every_parameter_gets_a_gradient(shortcuts: Shortcuts) -> None:
    encoder, decoder = convnet(shortcuts=shortcuts)
    reconstructed(encoder, decoder, 16, 4).square().sum().backward()  # type: ignore[no-untyped-call]
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_spec_survives_json_and_builds_the_same_network() -> None:
    _, decoder = convnet(size=29, shortcuts="input_output")
    spec = json.loads(json.dumps(decoder.spec))
    assert spec == decoder.spec
    twin = Decoder(**spec)
    assert twin.spec == spec
    twin.load_state_dict(decoder.state_dict())
    maps, image = [torch.rand(2, *shape) for shape in spec["shapes"]], torch.rand(2, 3, 29, 29)
    assert torch.equal(twin(maps, image), decoder(maps, image))


@pytest.mark.parametrize(("norm", "kind"), [("batch", BatchNorm), ("sync", SyncBatchNorm), ("group", nn.GroupNorm)])
def test_decoder_norms_are_of_the_chosen_kind(norm: str, kind: type[nn.Module]) -> None:
    _, decoder = autoencoder({"name": "convnet", "width": 4}, 16, norm=norm)
    assert [type(layer) for layer in decoder.norms] == [kind] * 3


def test_init_draws_the_weights() -> None:
    decoder = Decoder([(32, 8, 8), (64, 4, 4)], 3, 16, init="gaussian")
    for layer in layers(decoder, nn.ConvTranspose2d):
        assert isinstance(layer.weight, Tensor)
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert isinstance(decoder.last.bias, Tensor)
    assert not decoder.last.bias.any()


def token_decoder(prefix: int = 1) -> TokenDecoder:
    torch.manual_seed(0)
    return TokenDecoder(6, prefix, 5, dim=8, depth=2, heads=2).double()


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_masked_patches_are_decoded_from_the_visible_ones_and_the_prefix(prefix: int) -> None:
    decoder, rng = token_decoder(prefix), torch.Generator().manual_seed(1)
    tokens = torch.randn(2, prefix + 2, 6, generator=rng, dtype=torch.float64)
    visible, wanted = torch.tensor([[3, 1], [8, 0]]), torch.tensor([[0, 5, 7], [1, 2, 8]])
    found = decoder(tokens, visible, wanted, (3, 3))
    expected = [
        references_masked.decode_patches(decoder, *image, 3)
        for image in zip(tokens, visible.tolist(), wanted.tolist(), strict=True)
    ]
    # Positions are in single precision.
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)


def test_token_decoder_is_initialised_as_the_authors_do() -> None:
    decoder = TokenDecoder(64, 1, 48, dim=128, depth=1, heads=4)
    assert float(decoder.mask_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    for layer in layers(decoder, nn.Linear):
        assert isinstance(layer.weight, Tensor)
        assert isinstance(layer.bias, Tensor)
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert bound * 0.98 < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()


@pytest.mark.parametrize(("dim", "rows", "columns"), [(4, 1, 1), (8, 3, 5), (192, 8, 8)])
def test_positions_are_sines_of_the_column_and_of_the_row(dim: int, rows: int, columns: int) -> None:
    expected = [references_masked.position(dim, k // columns, k % columns) for k in range(rows * columns)]
    torch.testing.assert_close(encode_positions(dim, rows, columns), torch.tensor(expected), rtol=0, atol=1e-6)


def test_positions_are_lightlys() -> None:
    utils = pytest.importorskip("lightly.models.utils")
    theirs = utils.get_2d_sine_cosine_positional_embedding(32, 7, num_prefix_tokens=0)
    torch.testing.assert_close(encode_positions(32, 7, 7), torch.as_tensor(theirs).float(), rtol=0, atol=1e-6)
