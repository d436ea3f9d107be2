import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import (
    ENCODERS,
    Encoder,
    InputNormalization,
    SharedEncoderOptions,
    pool_maps,
    pooled_size,
)


def dense(side: int, *channels: int) -> list[tuple[int, ...]]:
    """The maps of a densely connected network whose stem gives `side` x `side`; `channels` of each block."""
    maps: list[tuple[int, ...]] = [(64, side, side)]
    width = 0
    for block, width in enumerate(channels):
        maps += [(width, side, side)]
        if block < len(channels) - 1:
            side //= 2
            maps += [(width // 2, side, side)]
    return [*maps, (width, side, side)]


def two(channels: int, side: int) -> list[tuple[int, int, int]]:
    """A block of network2: two convolutions and the one of stride 2."""
    return [(channels, side, side)] * 2 + [(channels, (side + 1) // 2, (side + 1) // 2)]


SPECS: list[tuple[dict[str, Any], int, Sequence[tuple[int, ...]]]] = [
    ({"name": "convnet", "width": 4, "depth": 3}, 32, [(4, 16, 16), (8, 8, 8), (16, 4, 4)]),
    ({"name": "convnet", "width": 2, "depth": 5}, 32, [(2, 16, 16), (4, 8, 8), (8, 4, 4), (8, 2, 2), (8, 1, 1)]),
    ({"name": "alexnet"}, 224, [(96, 27, 27), (256, 13, 13), (384, 13, 13), (384, 13, 13), (256, 6, 6)]),
    ({"name": "alexnet", "stem": "cifar"}, 32, [(96, 15, 15), (256, 7, 7), (384, 7, 7), (384, 7, 7), (256, 3, 3)]),
    ({"name": "resnet18"}, 64, [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
    ({"name": "resnet18", "stem": "cifar"}, 32, [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
    ({"name": "resnet50"}, 32, [(64, 8, 8), (256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)]),
    ({"name": "resnet50", "stem": "cifar"}, 8, [(64, 8, 8), (256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)]),
    ({"name": "resnet101"}, 32, [(64, 8, 8), (256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)]),
    ({"name": "vgg16"}, 64, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]),
    ({"name": "densenet121"}, 64, dense(16, 256, 512, 1024, 1024)),
    ({"name": "densenet121", "stem": "cifar"}, 16, dense(16, 256, 512, 1024, 1024)),
    ({"name": "densenet169"}, 32, dense(8, 256, 512, 1280, 1664)),
    ({"name": "densenet201"}, 32, dense(8, 256, 512, 1792, 1920)),
    (
        {"name": "network1", "width": 2},
        29,
        [(2, 29, 29)] * 4 + [(2, 15, 15)] + [(4, 15, 15)] * 4 + [(4, 8, 8)] + [(8, 8, 8)] * 4 + [(8, 4, 4)],
    ),
    ({"name": "network1", "m": [1, 0, 0, 2], "width": 1}, 9, [(1, 5, 5), (8, 5, 5), (8, 3, 3)]),
    (
        {"name": "network2"},
        33,
        [(64, 33, 33), (64, 17, 17), (128, 17, 17), (128, 9, 9), *two(256, 9), *two(512, 5), *two(512, 3)],
    ),
    ({"name": "sc_convnet"}, 32, [(96, 16, 16), (192, 8, 8), (192, 8, 8)]),
    ({"name": "wide_resnet"}, 32, [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]),
    (
        {"name": "torchvision", "model": "resnet18"},
        64,
        [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)],
    ),
    ({"name": "timm", "model": "resnet10t"}, 64, [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
]
LIBRARIES = [
    {"name": "torchvision", "model": "mobilenet_v3_small"},
    {"name": "timm", "model": "mobilenetv3_small_050"},
]


def ids(spec: object) -> str:
    return "-".join(map(str, spec.values())) if isinstance(spec, dict) else ""


class BuiltEncoder(NamedTuple):
    """An encoder as it is built after seed 3, and the random number that is drawn next. Tests change a `copy`."""

    encoder: Encoder
    next_number: Tensor
    spec: dict[str, Any]
    size: int
    shapes: Sequence[tuple[int, ...]]

    def copy(self) -> Encoder:
        return copy.deepcopy(self.encoder)


def build(spec: dict[str, Any], size: int, shapes: Sequence[tuple[int, ...]]) -> BuiltEncoder:
    torch.manual_seed(3)
    return BuiltEncoder(Encoder(spec, size), torch.rand(()), spec, size, shapes)


@pytest.fixture(scope="module", params=SPECS, ids=[ids(spec) for spec, _, _ in SPECS])
def built(request: pytest.FixtureRequest) -> BuiltEncoder:
    """Each of `SPECS`, which is built once for all tests: most of their time would go into its random weights."""
    return build(*request.param)


def test_every_encoder_is_tested() -> None:
    assert {spec["name"] for spec, _, _ in SPECS} == set(ENCODERS)


def test_shapes_are_the_documented_ones_and_those_of_a_forward_pass(built: BuiltEncoder) -> None:
    encoder, size, shapes = built.copy(), built.size, built.shapes
    maps = encoder.eval()(torch.rand(2, 3, size, size))
    assert encoder.shapes == shapes
    assert [tuple(m.shape) for m in maps] == [(2, *shape) for shape in shapes]
    c, h, w = shapes[-1]
    assert (pooled_size(encoder, "avg"), pooled_size(encoder, "flatten")) == (c, c * h * w)
    assert pool_maps(maps, "flatten").shape == (2, c * h * w)
    torch.testing.assert_close(pool_maps(maps, "avg"), maps[-1].flatten(2).mean(2))


def test_new_encoder_is_in_training_mode_with_fresh_statistics() -> None:
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2}, 8)
    assert all(m.training for m in encoder.modules())
    assert int(encoder.state_dict()["stages.0.1.num_batches_tracked"]) == 0
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize(
    ("spec", "size"),
    [({"name": "convnet", "depth": 4}, 15), ({"name": "alexnet"}, 62), ({"name": "alexnet", "stem": "cifar"}, 14)],
)
def test_too_small_images_raise(spec: dict, size: int) -> None:
    with pytest.raises(ValueError, match=rf"images of {size} pixels are too small for {spec['name']}"):
        Encoder(spec, size)
    assert Encoder(spec, size + 1).shapes[-1][1:] == (1, 1)


@pytest.mark.fault(40, "groups of one value")
def test_normalisation_of_single_values_raises() -> None:
    with pytest.raises(
        ValueError, match="model: 'skresnet18' cannot take images of 64 pixels: Expected more than 1 value"
    ):
        Encoder({"name": "timm", "model": "skresnet18", "norm": "group"}, 64)


def test_empty_map_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "cut", lambda c_in: [nn.ZeroPad2d(-4)])
    with pytest.raises(ValueError, match="images of 8 pixels are too small for cut"):
        Encoder({"name": "cut"}, 8)


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_take_the_smallest_images_that_a_config_allows(name: str) -> None:
    assert Encoder({"name": name}, 4).shapes[-1][1:] == (1, 1)


@pytest.mark.parametrize(("kind", "channels"), [("rgb", 3), ("gray", 1), ("sobel", 2), ("high_pass", 3)])
def test_input_has_no_parameters_and_no_state(kind: str, channels: int) -> None:
    encoder = Encoder({"name": "convnet", "input": kind, "mean": [0.1, 0.2, 0.3], "width": 4, "depth": 2}, 8)
    assert list(encoder.input.parameters()) == []
    assert all(name.startswith("stages.") for name in encoder.state_dict())
    assert encoder.input(torch.rand(2, 3, 8, 8)).shape == (2, channels, 8, 8)
    assert encoder.state_dict()["stages.0.0.weight"].shape[1] == channels


def test_the_parameters_of_the_input_are_among_the_shared_ones_with_the_same_defaults() -> None:
    shared = {field.name: field.default for field in fields(SharedEncoderOptions)}
    own = {
        name: p.default
        for name, p in inspect.signature(InputNormalization.__init__).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    assert shared == {**own, "init": "default"}


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize("spec", [{"name": "convnet", "width": 4, "depth": 3}, *LIBRARIES], ids=ids)
@pytest.mark.parametrize("input", ["rgb", "rgb_sobel"])
def test_depth_limits_the_maps(spec: dict, input: str) -> None:
    encoder, images = Encoder({**spec, "input": input}, 64).eval(), torch.rand(2, 3, 64, 64)
    whole = encoder(images)
    for depth in range(1, len(whole) + 1):
        for found, expected in zip(encoder(images, depth=depth), whole[:depth], strict=True):
            assert torch.equal(found, expected)


def test_stages_deeper_than_depth_are_not_computed() -> None:
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 3}, 8)
    encoder(torch.rand(4, 3, 8, 8), depth=2)
    assert [int(count) for name, count in encoder.state_dict().items() if name.endswith("num_batches_tracked")] == [
        1,
        1,
        0,
    ]


def test_encoder_weights_depend_on_the_seed_only(built: BuiltEncoder) -> None:
    again = build(built.spec, built.size, built.shapes)
    assert built.next_number == again.next_number
    assert all(m.training for m in built.encoder.modules())
    weights = built.encoder.state_dict()
    for (name, tensor), other in zip(weights.items(), again.encoder.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        if "running" in name or "num_batches" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float("running_var" in name))), name


def test_the_deepest_map_gives_every_parameter_a_gradient(built: BuiltEncoder) -> None:
    assert_every_parameter_gets_a_gradient(built.copy(), built.size)


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize("spec", LIBRARIES, ids=ids)
def test_the_deepest_map_of_a_library_gives_every_parameter_a_gradient(spec: dict) -> None:
    assert_every_parameter_gets_a_gradient(Encoder(spec, 64), 64)


def assert_every_parameter_gets_a_gradient(encoder: Encoder, size: int) -> None:
    assert all(p.requires_grad for p in encoder.parameters())
    encoder(torch.rand(2, 3, size, size) if size < 224 else torch.rand(1, 3, size, size))[-1].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_parameters_unused_by_the_deepest_map_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.branch = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.trunk(x)
            return [self.branch(x), x]

    monkeypatch.setitem(ENCODERS, "branched", lambda c_in: Branched())
    with torch.no_grad():  # whatever the surroundings
        encoder = Encoder({"name": "branched"}, 4)
    trains = {name: p.requires_grad for name, p in encoder.named_parameters()}
    assert trains == {
        "stages.trunk.weight": True,
        "stages.trunk.bias": True,
        "stages.branch.weight": False,
        "stages.branch.bias": False,
    }


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize(
    "spec",
    [{"name": "convnet", "width": 4, "depth": 2}, {"name": "resnet18", "stem": "cifar", "norm": "group"}, *LIBRARIES],
    ids=ids,
)
def test_two_towers_are_two_encoders_side_by_side(spec: dict) -> None:
    both = Encoder({**spec, "input": "rgb_sobel", "gray": "mean"}, 32)
    rgb, sobel = Encoder(spec, 32), Encoder({**spec, "input": "sobel", "gray": "mean"}, 32)
    weights = both.state_dict()
    rgb.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("twin.")})
    sobel.load_state_dict(
        {name.removeprefix("twin."): tensor for name, tensor in weights.items() if name.startswith("twin.")}
    )
    assert both.shapes == [(2 * c, h, w) for c, h, w in rgb.shapes]
    assert both.input.input == "rgb"
    images = torch.rand(3, 3, 32, 32)
    for found, left, right in zip(both(images), rgb(images), sobel(images), strict=True):
        assert torch.equal(found, torch.cat((left, right), 1))
    both(images)[-1].square().sum().backward()
    assert all(p.grad is not None for p in both.parameters())


def test_two_towers_have_weights_of_their_own_and_the_first_comes_first_by_name() -> None:
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2, "input": "rgb_sobel"}, 8)
    weights = encoder.state_dict()
    assert [weights[name].shape[1] for name in sorted(weights) if name.endswith("0.0.weight")] == [3, 2]
    assert not torch.equal(weights["stages.1.0.weight"], weights["twin.stages.1.0.weight"])


@pytest.mark.parametrize(
    "spec",
    [
        {
            "name": "convnet",
            "width": 4,
            "depth": 2,
            "input": "rgb_sobel",
            "gray": "mean",
            "padding": "zeros",
            "mean": (0.1, 0.2, 0.3),
        },
        {"name": "network1", "m": (2, 1, 0, 0), "width": 2, "init": "gaussian", "normalize": "image"},
        {**LIBRARIES[0], "norm": "group", "input": "sobel"},
        {**LIBRARIES[1], "norm": "sync", "input": "gray"},
    ],
    ids=ids,
)
def test_spec_and_weights_survive_json_and_state_dict(spec: dict) -> None:
    encoder = Encoder(spec, 32)
    encoder(torch.rand(4, 3, 32, 32))  # so that running statistics are not those of a fresh one
    again = Encoder(json.loads(json.dumps(encoder.spec)), 32)
    again.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 32, 32)
    for found, expected in zip(again.eval()(images), encoder.eval()(images), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", [{"name": "convnet", "width": 16, "depth": 2}, LIBRARIES[1]], ids=ids)
@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("gaussian", lambda w: 0.01),
        ("he", lambda w: (2 / w[0].numel()) ** 0.5),
        ("xavier", lambda w: (2 / (w[0].numel() + w[:, 0].numel())) ** 0.5),
    ],
)
def test_init_reaches_every_convolution_of_both_towers(spec: dict, init: str, expected: Any) -> None:
    torch.manual_seed(0)
    encoder = Encoder({**spec, "init": init, "input": "rgb_sobel"}, 32)
    for name, tensor in encoder.state_dict().items():
        if tensor.ndim == 4 and tensor.numel() > 400:
            assert tensor.std() == pytest.approx(expected(tensor), rel=0.15), name


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize(
    "spec", [{"name": "vgg16"}, {"name": "network1", "width": 2, "input": "rgb_sobel"}, LIBRARIES[0]], ids=ids
)
def test_memory_layout_changes_no_map(spec: dict) -> None:
    encoder, images = Encoder(spec, 32).eval(), torch.rand(2, 3, 32, 32)
    expected = encoder(images)
    for found, map_ in zip(encoder.to(memory_format=torch.channels_last)(images), expected, strict=True):
        torch.testing.assert_close(found, map_, rtol=1e-4, atol=1e-5)


def test_the_first_filters_are_those_of_each_tower_as_they_act_on_the_image() -> None:
    plain = Encoder({"name": "convnet", "width": 4, "depth": 2, "norm": "group"}, 16)
    (filters,) = plain.compose_first_filters()
    first = next(module for module in plain.modules() if isinstance(module, torch.nn.Conv2d))
    assert torch.equal(filters, first.weight)
    assert not filters.requires_grad
    rgb, sobel = Encoder(
        {"name": "convnet", "width": 4, "depth": 2, "norm": "group", "input": "rgb_sobel"}, 16
    ).compose_first_filters()
    assert rgb.shape[1] == 3
    assert sobel.shape[1:] == (1, *(side + 2 for side in rgb.shape[2:]))


@pytest.mark.parametrize("kind", ["sobel", "rgb_sobel"])
def test_maps_of_normalised_images_are_those_of_the_images(kind: str) -> None:
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2, "input": kind, "normalize": "image"}, 16).eval()
    images, region = torch.rand(3, 3, 16, 16), torch.tensor([[0.0, 2.0, 16.0, 13.0]]).expand(3, 4)
    inputs = encoder.normalize_images(images, region)
    assert inputs.shape[1] == encoder.input_channels == {"sobel": 2, "rgb_sobel": 5}[kind]
    for found, map_ in zip(encoder.forward_normalized(inputs), encoder(images, region=region), strict=True):
        torch.testing.assert_close(found, map_)
    assert not torch.equal(encoder(images)[-1], encoder(images, region=region)[-1])


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize("spec", [{"name": "alexnet"}, {"name": "alexnet", "input": "rgb_sobel"}, {"name": "vgg16"}])
def test_encoder_without_its_last_pooling_has_half_the_stride(spec: dict[str, Any]) -> None:
    encoder = Encoder(spec, 96).eval()
    stages = encoder.stages
    assert isinstance(stages, nn.ModuleList)
    before = encoder.state_dict()
    deep = encoder(torch.rand(1, 3, 96, 96))[-1]
    encoder.drop_last_pool()
    maps = encoder.eval()(torch.rand(1, 3, 96, 96))
    assert maps[-1].shape[-1] == encoder.shapes[-1][1] > 1.5 * deep.shape[-1]
    assert maps[-1].shape[1] == deep.shape[1]
    assert list(encoder.state_dict()) == list(before)


@pytest.mark.usefixtures("repeated_draws")
def test_the_map_before_the_last_pooling_gives_the_deepest_map_when_it_is_pooled() -> None:
    encoder, images = Encoder({"name": "alexnet"}, 96).eval(), torch.rand(2, 3, 96, 96)
    deepest = encoder(images)[-1]
    encoder.drop_last_pool()
    # ReLU and max-pooling can be exchanged.
    torch.testing.assert_close(nn.functional.max_pool2d(encoder.eval()(images)[-1], 3, 2), deepest)


@pytest.mark.usefixtures("repeated_draws")
@pytest.mark.parametrize("spec", [{"name": "resnet18"}, {"name": "network1", "m": [1, 1, 0, 0]}, LIBRARIES[0]], ids=ids)
def test_encoder_that_ends_without_pooling_keeps_its_stride(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^last_pool: 'drop' is not valid: \w+ does not end with one max-pooling"):
        Encoder(spec, 64).drop_last_pool()
