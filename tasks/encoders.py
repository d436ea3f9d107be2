"""Encoders by name: an image in 0..1 -> its feature maps, shallow to deep. What every stage hands to the next."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from annotated_types import Ge, Gt
from torch import Tensor, nn

from tasks.norms import Norm, norm_layer

Channel = Annotated[float, Ge(0.0)]
Spread = Annotated[float, Gt(0.0)]
Width = Annotated[int, Ge(1)]
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision


class Input(nn.Module):
    """(B, 3, H, W) in 0..1 -> what the first convolution sees: normalised, then maybe filtered. Has no parameters to learn.

    `normalize: dataset` uses `mean` and `std`; `image` subtracts each image's mean and divides by its standard deviation (NAT's code).
    `input: sobel` gives the two gradients of the gray image (NAT, section 3.3); `high_pass` the image minus its 5x5 Gaussian blur (NAT,
    table 2; the paper does not give the filter); `gray` one channel.
    """

    mean: Tensor
    std: Tensor
    gray: Tensor
    gradients: Tensor
    blur: Tensor

    def __init__(
        self,
        *,
        input: Literal["rgb", "gray", "sobel", "high_pass"] = "rgb",
        normalize: Literal["dataset", "image"] = "dataset",
        mean: tuple[Channel, Channel, Channel] = (0.5, 0.5, 0.5),
        std: tuple[Spread, Spread, Spread] = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__()
        self.input, self.normalize = input, normalize
        self.channels = {"rgb": 3, "gray": 1, "sobel": 2, "high_pass": 3}[input]
        dx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        blur = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
        # Constants of the spec, not state: kept out of the checkpoint.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("gray", torch.tensor(GRAY).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("gradients", torch.stack((dx, dx.T))[:, None], persistent=False)
        self.register_buffer("blur", torch.outer(blur, blur).expand(3, 1, 5, 5).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalize == "image":
            x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True).clamp_min(1e-5)
        else:
            x = (x - self.mean) / self.std
        if self.input == "high_pass":
            return x - F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), self.blur.to(x.dtype), groups=3)
        if self.input == "rgb":
            return x
        one = (x * self.gray).sum(1, keepdim=True)
        if self.input == "gray":
            return one
        return F.conv2d(F.pad(one, (1, 1, 1, 1), mode="replicate"), self.gradients.to(x.dtype))


Body = list[nn.Module]  # stages; the output of each is a feature map


def _block(c_in: int, c_out: int, kernel: int, norm: Norm, *, stride: int = 1, padding: int, pool: tuple[int, int] | None) -> nn.Sequential:
    """convolution, norm, max-pooling, ReLU: the order of NAT's AlexNet (pooling first is the same and cheaper)."""
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), norm_layer(norm, c_out)]
    layers += [nn.MaxPool2d(*pool)] if pool else []
    return nn.Sequential(*layers, nn.ReLU())


def convnet(c_in: int, *, norm: Norm = "batch", width: Width = 32, depth: Annotated[int, Ge(1)] = 4) -> Body:
    """`depth` 3x3 convolutions of width, 2 width, 4 width, 4 width ... channels, each followed by 2x2 pooling: for tests and laptops."""
    channels = [c_in] + [width * min(2**k, 4) for k in range(depth)]
    return [_block(a, b, 3, norm, padding=1, pool=(2, 2)) for a, b in itertools.pairwise(channels)]


def alexnet(c_in: int, *, norm: Norm = "batch", stem: Literal["imagenet", "cifar"] = "imagenet") -> Body:
    """The convolutions of NAT's AlexNet: 96-256-384-384-256, batch-normalised, no groups. 224x224 -> 256x6x6.

    `stem: cifar` replaces the 11x11 stride-4 convolution by a 5x5 one of stride 1 (32x32 -> 256x3x3).
    """
    first = (11, 4, 2) if stem == "imagenet" else (5, 1, 2)
    return [
        _block(c_in, 96, first[0], norm, stride=first[1], padding=first[2], pool=(3, 2)),
        _block(96, 256, 5, norm, padding=2, pool=(3, 2)),
        _block(256, 384, 3, norm, padding=1, pool=None),
        _block(384, 384, 3, norm, padding=1, pool=None),
        _block(384, 256, 3, norm, padding=1, pool=(3, 2)),
    ]


def _resnet(name: str) -> Callable[..., Body]:
    def build(c_in: int, *, norm: Norm = "batch", stem: Literal["imagenet", "cifar"] = "imagenet") -> Body:
        net = torchvision.models.get_model(name, weights=None, norm_layer=lambda c: norm_layer(norm, c))
        conv = nn.Conv2d(c_in, 64, 7, 2, 3, bias=False) if stem == "imagenet" else nn.Conv2d(c_in, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        pool = [net.maxpool] if stem == "imagenet" else []
        return [nn.Sequential(conv, net.bn1, net.relu, *pool), net.layer1, net.layer2, net.layer3, net.layer4]

    build.__doc__ = f"torchvision's {name}; `stem: cifar` has a 3x3 first convolution and no pooling."
    return build


ENCODERS: dict[str, Callable[..., Body]] = {
    "convnet": convnet,
    "alexnet": alexnet,
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50"),
}
_INPUT_KEYS = ("input", "normalize", "mean", "std")


class Encoder(nn.Module):
    """The network of a spec: `name`, the parameters of that entry of ENCODERS, and those of `Input`.

    `shapes`: (C, h, w) of each feature map for images of `image_size`.

    Raises:
        ValueError: images of `image_size` are too small for the network.
    """

    def __init__(self, spec: Mapping[str, Any], image_size: int) -> None:
        super().__init__()
        self.spec, self.image_size = dict(spec), image_size
        self.input = Input(**{k: v for k, v in spec.items() if k in _INPUT_KEYS})
        rest = {k: v for k, v in spec.items() if k not in (*_INPUT_KEYS, "name")}
        self.stages = nn.ModuleList(ENCODERS[spec["name"]](self.input.channels, **rest))
        try:
            with torch.no_grad():
                self.eval()
                self.shapes = [tuple(map_.shape[1:]) for map_ in self(torch.zeros(1, 3, image_size, image_size))]
        except RuntimeError:
            raise ValueError(f"images of {image_size} pixels are too small for {spec['name']}") from None
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.input(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def pooled(maps: Sequence[Tensor], pool: str) -> Tensor:
    """The deepest map as vectors: (B, C) averaged over places, or (B, C * h * w) flattened."""
    return maps[-1].mean((2, 3)) if pool == "avg" else maps[-1].flatten(1)


def pooled_size(encoder: Encoder, pool: str) -> int:
    c, h, w = encoder.shapes[-1]
    return int(c if pool == "avg" else c * h * w)
