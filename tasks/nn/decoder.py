"""Decoders: one that mirrors an encoder (Dong et al. 2016, section 3.1), and one of a ViT's tokens (He et al. 2021).

timm is imported inside functions: it takes seconds, and only its users should wait.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.nn.norms import Norm, norm_layer
from firstlight.tasks.nn.weight_init import Init, initialize_weights

Shortcuts = Literal["none", "input_output", "full"]


class Decoder(nn.Module):
    """A deconvolution per map of the encoder, from the shape of that map to the shape of the map before it.

    The last deconvolution gives the image (arXiv 1611.09119). Each but the last is followed by normalisation and ReLU;
    the last by neither, since a 0-centred image has negative values. The attribute `spec` holds plain values for JSON:
    `Decoder(**spec)` is the same network with new weights.

    Args:
        shapes: (C, h, w) of the encoder's maps s_1 .. s_L, shallow to deep.
        channels: the channels of the encoder's input s_0.
        image_size: the side of the encoder's input s_0.
        shortcuts: `input_output` adds the encoder's input to the output. `full` also adds every second map s_2, s_4,
            ... before s_L to the decoder's activation of the same shape (table 6). The sum is taken before the ReLU, as
            in RED-Net (Mao et al. 2016), which the paper builds on; the paper's figure 1 does not show it.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        channels: int,
        image_size: int,
        *,
        shortcuts: Shortcuts = "full",
        norm: Norm = "batch",
        init: Init = "gaussian",
    ) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            "shapes": [list(shape) for shape in shapes],
            "channels": channels,
            "image_size": image_size,
        }
        self.spec |= {"shortcuts": shortcuts, "norm": norm, "init": init}
        self.with_input = shortcuts != "none"
        # The numbers of the maps that are added.
        self.joined = range(2, len(shapes), 2) if shortcuts == "full" else range(0)
        mirrored = list(reversed([(channels, image_size, image_size), *shapes]))
        *inner, last = itertools.pairwise(mirrored)
        self.deconvolutions = nn.ModuleList(make_deconvolution(deep, shallow, bias=False) for deep, shallow in inner)
        self.norms = nn.ModuleList(norm_layer(norm, shallow[0]) for _, shallow in inner)
        self.last = make_deconvolution(*last, bias=True)
        initialize_weights(self, init)

    def forward(self, maps: Sequence[Tensor], image: Tensor) -> Tensor:
        """Decodes the encoder's L maps. `image`: its input (B, channels, image_size, image_size).

        Returns a tensor of the shape of `image`.
        """
        out: Tensor = self.last(self.compute_features(maps))
        return out + image if self.with_input else out

    def compute_features(self, maps: Sequence[Tensor]) -> Tensor:
        """Computes all but the last deconvolution, (B, *s_1). Segmentation replaces the last one (section 4.2.4)."""
        x = maps[-1]
        # The number of the map whose shape comes out.
        numbers = range(len(maps) - 1, 0, -1)
        for number, deconvolve, norm in zip(numbers, self.deconvolutions, self.norms, strict=True):
            x = norm(deconvolve(x))
            x = F.relu(x + maps[number - 1] if number in self.joined else x)
        return x


class TokenDecoder(nn.Module):
    """A transformer from the tokens of visible patches to the pixels of masked ones (MAE: He et al. 2021, section 3).

    A learned token stands in place of each masked patch. Fixed position embeddings are added to all patches, and zeros
    to prefix tokens. Weights are drawn as in the authors' code.

    Args:
        size: the width of the encoder's tokens.
        prefix: the number of its tokens that are no patches.
        out: the number of values of a patch.
        dim: the width of the decoder, a multiple of 4.
        depth: the number of its blocks.
        heads: the number of attention heads of a block, which divides `dim`.
    """

    def __init__(self, size: int, prefix: int, out: int, *, dim: int, depth: int, heads: int) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.num_prefix = prefix
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(size, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm, self.last = norm(dim), nn.Linear(dim, out)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, visible: Tensor, wanted: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns the (B, M, out) values of patches.

        Args:
            tokens: (B, prefix + K, size), of the prefix and of the visible patches.
            visible: (B, K) int64 numbers of these patches.
            wanted: (B, M) int64 numbers of the patches whose values are returned.
            grid: the rows and columns of patches in an image.
        """
        embedded: Tensor = self.embed(tokens)
        prefix, seen = embedded[:, : self.num_prefix], embedded[:, self.num_prefix :]
        masked = self.mask_token.to(seen.dtype).expand(len(seen), grid[0] * grid[1], -1)
        patches = masked.scatter(1, visible[..., None].expand_as(seen), seen)
        patches = patches + encode_positions(seen.shape[2], *grid, device=seen.device)
        decoded: Tensor = self.norm(self.blocks(torch.cat((prefix, patches), 1)))
        values: Tensor = self.last(decoded[:, self.num_prefix :].take_along_dim(wanted[..., None], 1))
        return values


def encode_positions(dim: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Returns (rows * columns, dim) fixed embeddings of positions, in row order, in float32 (MAE's code).

    The first half encodes the column and the second the row, each by dim / 4 sines before as many cosines, whose
    wavelengths grow from 2 pi by powers of 10,000 (Vaswani et al. 2017, section 3.5).
    """
    rates = 10_000.0 ** (-torch.arange(dim // 4, device=device) / (dim // 4))
    sides = torch.arange(rows, device=device), torch.arange(columns, device=device)
    down, across = torch.meshgrid(*sides, indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (across, down)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)


def make_deconvolution(deep: Sequence[int], shallow: Sequence[int], *, bias: bool) -> nn.ConvTranspose2d:
    """Returns a deconvolution from exactly (C, h, h) to (C', h', h').

    It is 3x3 if the encoder's layer was a convolution of stride 1 or 2.
    """
    kernel, stride, padding, extra = deconvolution_geometry(deep[1], shallow[1])
    return nn.ConvTranspose2d(deep[0], shallow[0], kernel, stride, padding, output_padding=extra, bias=bias)


def deconvolution_geometry(small: int, large: int) -> tuple[int, int, int, int]:
    """Returns kernel, stride, padding and output padding that map `small` positions to exactly `large`.

    The kernel reaches every position. The size is (small - 1) stride + kernel - 2 padding + output padding. The stride
    is the ratio of the sizes, rounded, and the kernel the smallest from 3 on that leaves no gaps between strides, nor
    at the end (output padding beyond the padding).
    """
    stride = max(1, int(large / small + 0.5))
    wanted = large - (small - 1) * stride
    for kernel in itertools.count(max(3, stride)):
        padding = max(0, -((wanted - kernel) // 2))
        extra = wanted - kernel + 2 * padding
        if extra <= padding and extra < stride:
            return kernel, stride, padding, extra
    raise AssertionError("some kernel fits: an even or an odd one as large as `wanted`")
