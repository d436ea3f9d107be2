"""Views of whole images, and the answers for views, brought back to the pixels of the images.

A view is a crop of an image, or the whole image on padding. A network answers for the pixels of the view; whoever asks
wants masks and boxes of the image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The value of a mask for pixels that are neither learned nor counted, and for pixels that no view shows.
VOID_CLASS = 255
# The pixels of an image whose class is decided at a time.
MASK_BLOCK_PIXELS = 2**17
# A pixel whose centre misses a view by rounding alone lies in it.
EDGE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ImageViews:
    """An image as a task sees it: its V views, each of S x S pixels, and where they lie in it."""

    # (V, 3, S, S) float in 0..1.
    views: Tensor
    # (V, 4) float: left, top, right and bottom of the part of each view that shows the image; the rest is padding.
    regions: Tensor
    # (V, 2, 3) float64: the point (x, y) of the image is the point `to_view @ (x, y, 1)` of a view, in pixels of each.
    to_view: Tensor
    # Width and height of the image in pixels.
    size: tuple[int, int]


def classify_pixels(logits: Tensor, image: ImageViews) -> Tensor:
    """Returns the (height, width) uint8 classes of the pixels of an image; VOID_CLASS where no view shows them.

    `logits`: (V, C, S, S), those of its views. They are averaged where views overlap. Between the centres of two logits
    they are linear, towards the edge of a view constant.
    """
    width, height = image.size
    step = max(1, MASK_BLOCK_PIXELS // width)
    blocks = [_classify_rows(logits, image, top, min(top + step, height)) for top in range(0, height, step)]
    return torch.cat(blocks)


def _classify_rows(logits: Tensor, image: ImageViews, top: int, bottom: int) -> Tensor:
    """Returns the (bottom - top, width) uint8 classes of some rows of an image."""
    width, side = image.size[0], logits.shape[-1]
    rows, columns = (
        torch.arange(start, stop, dtype=torch.float64, device=logits.device) + 0.5
        for start, stop in ((top, bottom), (0, width))
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack((x, y, torch.ones_like(x)), -1)
    total = logits.new_zeros(logits.shape[1], bottom - top, width)
    count = torch.zeros(bottom - top, width, dtype=torch.int32, device=logits.device)
    for one, to_view, region in zip(logits, image.to_view, image.regions.double(), strict=True):
        points = centres @ to_view.to(logits.device).T
        low, high = region[:2], region[2:]
        inside = ((points >= low - EDGE_TOLERANCE) & (points <= high + EDGE_TOLERANCE)).all(-1)
        if not bool(inside.any()):
            continue
        # Half a pixel from the edge is the centre of the last logit that the image has.
        middle = (low + high) / 2
        points = points.clamp(torch.minimum(low + 0.5, middle), torch.maximum(high - 0.5, middle))
        grid = (points * (2 / side) - 1).to(logits.dtype)
        found = F.grid_sample(one[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
        total += found * inside
        count += inside
    # The mean has the largest value where the sum has it.
    return torch.where(count > 0, total.argmax(0), VOID_CLASS).to(torch.uint8)


def move_boxes_back(boxes: Tensor, image: ImageViews) -> Tensor:
    """Returns boxes of the only view of an image as (k, 4) float64 boxes in its pixels, cut at its edges.

    `boxes`: (k, 4), left, top, right and bottom in pixels of the view. A turned box becomes the box around it.
    """
    (to_view,) = image.to_view.to(boxes.device)
    corners = boxes.double()[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
    back = torch.linalg.solve(to_view[:, :2], (corners - to_view[:, 2]).T).T.reshape(-1, 4, 2)
    limits = torch.tensor(image.size * 2, dtype=torch.float64, device=boxes.device)
    whole = torch.cat((back.amin(1), back.amax(1)), 1)
    return torch.minimum(whole.clamp_min(0.0), limits)
