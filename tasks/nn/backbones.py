"""Backbones by name: each is a list of stages, and the output of every stage is a feature map.

torchvision is imported inside functions: it loads torch's compiler, for which every command and worker would wait two
seconds.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from annotated_types import Ge
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.nn.norms import Norm, norm_layer

Body = list[nn.Module]
Width = Annotated[int, Ge(1)]
Layers = Annotated[int, Ge(0)]
Stem = Literal["imagenet", "cifar"]


def replace_batch_norm(network: nn.Module, norm: Norm) -> nn.Module:
    """Replaces every batch normalisation of `network` by `norm`, and returns `network`.

    Eps, momentum and the initial weights stay.
    """
    fresh: dict[nn.Module, nn.Module] = {}
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if isinstance(layer, _BatchNorm) and norm != "batch":
            fresh[layer] = fresh[layer] if layer in fresh else _make_norm_like(layer, norm)
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, fresh[layer])
    return network


def _make_norm_like(old: _BatchNorm, norm: Norm) -> nn.Module:
    new = norm_layer(norm, old.num_features)
    assert isinstance(new, _BatchNorm | nn.GroupNorm)
    new.eps = old.eps
    if isinstance(new, _BatchNorm):
        new.momentum = old.momentum
    if old.affine:
        new.load_state_dict({"weight": old.weight, "bias": old.bias}, strict=False)
    new.requires_grad_(old.affine)
    # timm's normalisations may hold the activation that follows them.
    return nn.Sequential(new, *old.children()) if list(old.children()) else new


def _conv_block(
    c_in: int,
    c_out: int,
    kernel: int,
    norm: Norm,
    *,
    stride: int = 1,
    padding: int,
    pool: tuple[int, int] | None = None,
) -> nn.Sequential:
    """Returns convolution, norm, max-pooling, ReLU: the order of NAT's AlexNet.

    ReLU after pooling is equal to ReLU before it, and cheaper.
    """
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), norm_layer(norm, c_out)]
    layers += [nn.MaxPool2d(*pool)] if pool else []
    return nn.Sequential(*layers, nn.ReLU())


def convnet(c_in: int, *, norm: Norm = "batch", width: Width = 32, depth: Annotated[int, Ge(1)] = 4) -> Body:
    """Builds a small network for tests and laptops: 3x3 convolutions, each followed by 2x2 pooling.

    `width`: the channels of the first convolution; the others have 2 width, 4 width, 4 width ...
    `depth`: the number of convolutions.
    """
    channels = [c_in] + [width * min(2**k, 4) for k in range(depth)]
    return [_conv_block(a, b, 3, norm, padding=1, pool=(2, 2)) for a, b in itertools.pairwise(channels)]


def alexnet(c_in: int, *, norm: Norm = "batch", stem: Stem = "imagenet") -> Body:
    """Builds the convolutions of NAT's AlexNet: 96-256-384-384-256, batch-normalised, no groups. 224x224 -> 256x6x6.

    `stem`: the first convolution: `imagenet` is 11x11 of stride 4, `cifar` 5x5 of stride 1 (32x32 -> 256x3x3).
    """
    first = (11, 4, 2) if stem == "imagenet" else (5, 1, 2)
    return [
        _conv_block(c_in, 96, first[0], norm, stride=first[1], padding=first[2], pool=(3, 2)),
        _conv_block(96, 256, 5, norm, padding=2, pool=(3, 2)),
        _conv_block(256, 384, 3, norm, padding=1),
        _conv_block(384, 384, 3, norm, padding=1),
        _conv_block(384, 256, 3, norm, padding=1, pool=(3, 2)),
    ]


def _first_convolution(c_in: int, stem: Stem, fan: str) -> nn.Conv2d:
    """Returns the first convolution of residual and dense networks."""
    conv = nn.Conv2d(c_in, 64, 7, 2, 3, bias=False) if stem == "imagenet" else nn.Conv2d(c_in, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode=fan, nonlinearity="relu")  # type: ignore[arg-type]
    return conv


def resnet_builder(name: str) -> Callable[..., Body]:
    """Returns the builder of torchvision's residual network `name`."""

    def build(c_in: int, *, norm: Norm = "batch", stem: Stem = "imagenet") -> Body:
        from torchvision.models import get_model

        net = get_model(name, weights=None, norm_layer=lambda c: norm_layer(norm, c))
        pool = [net.maxpool] if stem == "imagenet" else []
        first = nn.Sequential(_first_convolution(c_in, stem, "fan_out"), net.bn1, net.relu, *pool)
        return [first, net.layer1, net.layer2, net.layer3, net.layer4]

    build.__doc__ = (
        f"The residual network {name} of torchvision.\n\n"
        "`stem`: the first layers: `imagenet` is torchvision's, `cifar` a 3x3 convolution without pooling."
    )
    return build


def densenet_builder(name: str) -> Callable[..., Body]:
    """Returns the builder of torchvision's densely connected network `name`."""

    def build(c_in: int, *, norm: Norm = "batch", stem: Stem = "imagenet") -> Body:
        from torchvision.models import get_model

        net = get_model(name, weights=None).features
        pool = [net.pool0] if stem == "imagenet" else []
        first = nn.Sequential(_first_convolution(c_in, stem, "fan_in"), net.norm0, net.relu0, *pool)
        between = [stage for key, stage in net.named_children() if key.startswith(("denseblock", "transition"))]
        return [replace_batch_norm(stage, norm) for stage in (first, *between, nn.Sequential(net.norm5, nn.ReLU()))]

    build.__doc__ = (
        f"The densely connected network {name} of torchvision. "
        "It gives a map after the stem, every dense block and transition, and the last norm.\n\n"
        "`stem`: the first layers: `imagenet` is torchvision's, `cifar` a 3x3 convolution without pooling."
    )
    return build


def vgg16(c_in: int, *, norm: Norm = "batch") -> Body:
    """Builds the convolutions of torchvision's VGG-16 with batch normalisation: 224x224 -> 512x7x7.

    It gives a map after each of the five poolings.
    """
    from torchvision.models.vgg import cfgs, make_layers

    layers = list(make_layers(cfgs["D"], batch_norm=True))
    layers[0] = nn.Conv2d(c_in, 64, 3, padding=1)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    ends = [end for end, layer in enumerate(layers, 1) if isinstance(layer, nn.MaxPool2d)]
    return [
        replace_batch_norm(nn.Sequential(*layers[start:end]), norm) for start, end in itertools.pairwise([0, *ends])
    ]


def _strided_body(c_in: int, norm: Norm, blocks: Sequence[tuple[int, int]]) -> Body:
    """Returns layers - 1 convolutions and one of stride 2 for each (layers, channels). Every convolution is a stage."""
    strided = [(channels, 2 if layer == layers - 1 else 1) for layers, channels in blocks for layer in range(layers)]
    widths = itertools.pairwise([c_in, *(channels for channels, _ in strided)])
    return [
        _conv_block(a, b, 3, norm, stride=stride, padding=1)
        for (a, b), (_, stride) in zip(widths, strided, strict=True)
    ]


def network1(
    c_in: int, *, norm: Norm = "batch", m: tuple[Layers, Layers, Layers, Layers] = (5, 5, 5, 0), width: Width = 64
) -> Body:
    """Builds Network-1 of the denoising auto-encoder (Dong et al., table 1), by default the paper's network for CIFAR.

    Block b is m_b - 1 3x3 convolutions and one of stride 2, each with norm and ReLU. Every convolution gives a map,
    since the decoder mirrors them one by one. 29x29 -> 15x15 -> 8x8 -> 4x4.

    `m`: the numbers of convolutions of the four blocks; 0 leaves a block out. The paper's network for STL-10 has
    m = (3, 3, 4, 5).
    `width`: the channels of the first block; block b has `width` * 2^(b - 1).

    Raises:
        ValueError: no block is left.
    """
    if not any(m):
        raise ValueError(f"m: {list(m)} leaves no convolution; at least one of the four must be 1 or more")
    return _strided_body(c_in, norm, [(layers, width * 2**b) for b, layers in enumerate(m)])


def network2(c_in: int, *, norm: Norm = "batch") -> Body:
    """Builds Network-2 of the denoising auto-encoder (Dong et al., table 1).

    It is VGG-16 with a convolution of stride 2 at the end of each block.
    """
    return _strided_body(c_in, norm, [(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)])


def sc_convnet(c_in: int, *, norm: Norm = "batch") -> Body:
    """Builds the network of a third party's port of spatial contrasting to Keras, for 32x32 images.

    The paper does not give its own network. This one has three 3x3 convolutions of 96 channels, three of 192, each
    three with 2x2 pooling, then 3x3 and 1x1 of 192; each with norm and leaky ReLU of slope 0.3 (Keras' default). The
    port takes its patches from the second map. 32x32 -> 96x16x16, 192x8x8, 192x8x8.
    """
    return [
        nn.Sequential(
            *_leaky_layers(c_in, 96, 3, norm),
            *_leaky_layers(96, 96, 3, norm),
            *_leaky_layers(96, 96, 3, norm),
            nn.MaxPool2d(2),
        ),
        nn.Sequential(
            *_leaky_layers(96, 192, 3, norm),
            *_leaky_layers(192, 192, 3, norm),
            *_leaky_layers(192, 192, 3, norm),
            nn.MaxPool2d(2),
        ),
        nn.Sequential(*_leaky_layers(192, 192, 3, norm), *_leaky_layers(192, 192, 1, norm)),
    ]


def _leaky_layers(c_in: int, c_out: int, kernel: int, norm: Norm) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), norm_layer(norm, c_out), nn.LeakyReLU(0.3)]
