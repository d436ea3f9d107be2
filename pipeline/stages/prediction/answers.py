"""The answers of a fine-tuned model: classes with probabilities, masks, or objects, in pixels of the images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# The share of an image that a class must cover to be named.
MIN_NAMED_SHARE = 1e-9


@dataclass(frozen=True)
class ImageClasses:
    """The probabilities of all classes for one image.

    `names` are the classes in the order of `probabilities`, (C,) float32. They sum to 1 if the model was trained with
    one class for each image; if it was trained with several, each is the probability that its class is present.
    """

    names: tuple[str, ...]
    probabilities: np.ndarray

    @property
    def class_name(self) -> str:
        """The most probable class."""
        return self.names[int(self.probabilities.argmax())]

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return float(self.probabilities.max())

    def rank_classes(self, count: int) -> list[tuple[str, float]]:
        """Returns the `count` most probable classes with their probabilities, the most probable first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.names[k], float(self.probabilities[k])) for k in order.tolist()]


@dataclass(frozen=True)
class ImageMask:
    """The class of every pixel of one image: `mask` (height, width) uint8, indices of `names`.

    255 stands for pixels that the model does not see, where it looks at a crop of the image.
    """

    names: tuple[str, ...]
    mask: np.ndarray

    def measure_shares(self) -> np.ndarray:
        """Returns the (C,) shares of the image's pixels that are of each class; pixels without a class are of none."""
        counts = np.bincount(self.mask.reshape(-1), minlength=256)[: len(self.names)]
        shares: np.ndarray = counts / self.mask.size
        return shares

    def rank_classes(self, count: int) -> list[tuple[str, float]]:
        """Returns the `count` classes that cover most of the image, with their shares, the largest first."""
        shares = self.measure_shares()
        order = np.argsort(-shares, kind="stable")[:count]
        return [(self.names[k], float(shares[k])) for k in order.tolist() if shares[k] > MIN_NAMED_SHARE]


@dataclass(frozen=True)
class ImageObjects:
    """The objects in one image, the surest first.

    `boxes` (k, 4) float64: left, top, right and bottom in pixels of the image; `scores` (k,) float32 in 0..1; `labels`
    (k,) int64, indices of `names`.
    """

    names: tuple[str, ...]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def rank_classes(self, count: int) -> list[tuple[str, float]]:
        """Returns the classes of the `count` surest objects with their scores."""
        return [
            (self.names[label], float(score))
            for label, score in zip(self.labels[:count].tolist(), self.scores[:count].tolist(), strict=True)
        ]


ImageAnswer = ImageClasses | ImageMask | ImageObjects
ANSWER_TYPES: dict[str, Callable[..., ImageAnswer]] = {
    "label": ImageClasses,
    "present": ImageClasses,
    "mask": ImageMask,
    "boxes": ImageObjects,
}


def build_answer(target: str, names: tuple[str, ...], values: Mapping[str, Any]) -> ImageAnswer:
    """Returns the answer for an image from the arrays that a task of a kind of `target` has predicted."""
    return ANSWER_TYPES[target](names, **values)
