"""The input of an encoder: normalisation, optionally a fixed filter; and the parameters that all encoders share."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from firstlight.tasks.nn.weight_init import Init

Channel = Annotated[float, Ge(0.0)]
Deviation = Annotated[float, Gt(0.0)]
# A number for each channel.
Colour = tuple[Channel, ...]
Deviations = tuple[Deviation, ...]
Normalize = Literal["dataset", "image"]
GrayWeighting = Literal["luma", "mean"]
Padding = Literal["replicate", "zeros"]

# The channels of images if neither recipe nor data set says anything else, and the most channels.
RGB_CHANNELS = 3
Channels = Annotated[int, Ge(1), Le(512)]
DEFAULT_MEAN: Colour = (0.5, 0.5, 0.5)
DEFAULT_STD: Deviations = (0.25, 0.25, 0.25)
GRAY_WEIGHTS: dict[GrayWeighting, Colour] = {"luma": (0.299, 0.587, 0.114), "mean": (1 / 3, 1 / 3, 1 / 3)}


class InputNormalization(nn.Module):
    """Normalises (B, C, H, W) images in 0..1 and filters them for the first convolution. It has no learned parameters.

    `normalize`: `dataset` uses `mean` and `std`; `image` subtracts each image's mean and divides by its standard
    deviation (NAT's code).
    `mean`: the mean of each channel, for `normalize: dataset`. null: that of the training images.
    `std`: the standard deviation of each channel, for `normalize: dataset`. null: that of the training images.
    `input`: the channels that the first convolution gets: `rgb` the image, `gray` one channel, `sobel` the two
    gradients of the gray image (NAT, section 3.3), `high_pass` the image minus its 5x5 Gaussian blur (NAT, table 2; the
    paper does not give the filter). All but `rgb` need three channels.
    `channels`: the channels C of an image. null: those of `dataset.channels`, or three.
    `gray`: the weights of the channels in a gray image: `luma` those of ITU-R 601, PIL and torchvision, `mean` equal
    ones, as in the authors' code of NAT and Super-AND.
    `padding`: the values that the filters get outside the image: `replicate` its nearest pixel, `zeros` 0 of the
    normalised image, as in the authors' code of both.
    """

    mean: Tensor
    std: Tensor
    weights: Tensor
    gradients: Tensor
    blur: Tensor

    def __init__(
        self,
        *,
        input: Literal["rgb", "gray", "sobel", "high_pass"] = "rgb",
        channels: Channels | None = None,
        normalize: Normalize = "dataset",
        mean: Colour | None = DEFAULT_MEAN,
        std: Deviations | None = DEFAULT_STD,
        gray: GrayWeighting = "luma",
        padding: Padding = "replicate",
    ) -> None:
        super().__init__()
        self.input, self.normalize = input, normalize
        self.padding = "constant" if padding == "zeros" else "replicate"
        count = channels or RGB_CHANNELS
        if input != "rgb" and count != RGB_CHANNELS:
            raise ValueError(f"input: {input!r} needs images of 3 channels, these have {count}; valid: rgb")
        self.image_channels = count
        self.channels = {"rgb": count, "gray": 1, "sobel": 2, "high_pass": count}[input]
        dx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        blur = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
        # Constants of the spec, not state: kept out of the checkpoint.
        # A pipeline fills in what is null once it knows the images; before that, only shapes are asked for.
        for name, value, default in (("mean", mean, DEFAULT_MEAN), ("std", std, DEFAULT_STD)):
            numbers = torch.tensor(_fit_to_channels(name, value, default, count))
            self.register_buffer(name, numbers.view(1, count, 1, 1), persistent=False)
        self.register_buffer("weights", torch.tensor(GRAY_WEIGHTS[gray]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("gradients", torch.stack((dx, dx.T))[:, None], persistent=False)
        self.register_buffer("blur", torch.outer(blur, blur).expand(count, 1, 5, 5).contiguous(), persistent=False)

    def forward(self, x: Tensor, region: Tensor | None = None) -> Tensor:
        """Returns the (B, `channels`, H, W) input of the first convolution.

        `region`: (B, 4) left, top, right and bottom of the part of each view that shows the image, in pixels. With
        `normalize: image` the rest, which is padding, has no part in the statistics and becomes 0, their mean: so Fast
        R-CNN pads images after it has normalised them.
        """
        if self.normalize == "image" and region is not None:
            x = _standardize_regions(x, region)
        elif self.normalize == "image":
            x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True).clamp_min(1e-5)
        else:
            x = (x - self.mean) / self.std
        if self.input == "high_pass":
            return x - F.conv2d(F.pad(x, (2, 2, 2, 2), mode=self.padding), self.blur.to(x.dtype), groups=x.shape[1])
        if self.input == "rgb":
            return x
        one = (x * self.weights).sum(1, keepdim=True)
        if self.input == "gray":
            return one
        return F.conv2d(F.pad(one, (1, 1, 1, 1), mode=self.padding), self.gradients.to(x.dtype))

    def compose_filters(self, filters: Tensor) -> Tensor:
        """Composes the (n, c, k, k) filters of a convolution on this input with the filter of the input.

        Returns (n, 1 or C, K, K): the filters as they act on the gray image or on all channels, up to its
        normalisation (NAT, figure 4: the gradients composed with the first layer).
        """
        if self.input == "sobel":
            return F.conv_transpose2d(filters, self.gradients.to(filters))
        if self.input == "high_pass":
            kernel = -self.blur.to(filters)
            kernel[:, :, 2, 2] += 1.0
            return F.conv_transpose2d(filters, kernel, groups=self.channels)
        return filters


def _fit_to_channels(name: str, value: Colour | None, default: Colour, channels: int) -> Colour:
    """Returns a number for each channel; those of the default where there are none.

    Raises:
        ValueError: there are more or fewer; starts with `name`.
    """
    if value is None:
        return (default[0],) * channels
    if len(value) != channels:
        raise ValueError(f"{name}: {list(value)} are {len(value)} numbers, images have {channels} channels")
    return value


def _standardize_regions(x: Tensor, region: Tensor) -> Tensor:
    """Subtracts the mean of each image's region and divides by its standard deviation; outside of it all is 0."""
    left, top, right, bottom = region.to(x.dtype)[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5 for side in x.shape[2:])
    inside = ((rows > top) & (rows < bottom))[:, None, :, None] & ((columns > left) & (columns < right))[:, None, None]
    count = inside.sum((1, 2, 3), keepdim=True) * x.shape[1]
    centred = torch.where(inside, x - (x * inside).sum((1, 2, 3), keepdim=True) / count.clamp_min(1), 0.0)
    variance = centred.square().sum((1, 2, 3), keepdim=True) / (count - 1).clamp_min(1)
    return centred / variance.sqrt().clamp_min(1e-5)


@dataclass(frozen=True, kw_only=True)
class SharedEncoderOptions:
    """The parameters that every encoder has besides its own: those of `InputNormalization`, and `init`.

    `input`: the channels that the first convolution gets: `rgb` the image, `gray` one channel, `sobel` the two
    gradients of the gray image (NAT, section 3.3), `high_pass` the image minus its 5x5 Gaussian blur (NAT, table 2; the
    paper does not give the filter). `rgb_sobel` are two complete networks, one on the image and one on its gradients
    (Super-AND, figure 2). All but `rgb` need three channels.
    """

    input: Literal["rgb", "gray", "sobel", "high_pass", "rgb_sobel"] = "rgb"
    channels: Channels | None = None
    normalize: Normalize = "dataset"
    mean: Colour | None = DEFAULT_MEAN
    std: Deviations | None = DEFAULT_STD
    gray: GrayWeighting = "luma"
    padding: Padding = "replicate"
    init: Init = "default"

    def build_inputs(self) -> list[InputNormalization]:
        """Returns the input of each network: two for `rgb_sobel`, one otherwise."""
        options = {key: value for key, value in asdict(self).items() if key not in ("input", "init")}
        if self.input == "rgb_sobel":
            return [InputNormalization(input="rgb", **options), InputNormalization(input="sobel", **options)]
        return [InputNormalization(input=self.input, **options)]
