"""Near duplicates, likely leaks, odd ones out and a diverse subset of images, by the cosines of their features."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from firstlight.pipeline.stages.features.feature_index import FeatureIndex

# Neighbours of each image that are looked at.
NUM_COMPARED = 8
# The nearest of them, whose mean cosine says how odd an image is.
NUM_ODD_NEIGHBOURS = 5


@dataclass(frozen=True)
class ImagePair:
    """Two images that look alike, the lower id first."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class LookFindings:
    """Facts of images by their ids."""

    # The pairs of near duplicates, by falling cosine.
    near_duplicates: tuple[ImagePair, ...]
    # The pairs of which one image is to train on and the other is not.
    leaks: tuple[ImagePair, ...]
    # The images that are least like their nearest, with their mean cosine to these, the oddest first.
    odd: tuple[tuple[int, float], ...]
    # Images that are far from each other, in the order of their choice.
    diverse: tuple[int, ...]
    # Images to train on that are near an earlier one of these, or near an image that is not to train on.
    redundant: frozenset[int]


def find_all(
    ids: np.ndarray, features: np.ndarray, split_of: Mapping[int, str], similarity: float, odd: int, diverse: int
) -> LookFindings:
    """Finds what is worth a look among (n,) ids in ascending order with (n, d) features.

    Args:
        split_of: the split of each id.
        similarity: the least cosine of near duplicates.
        odd, diverse: how many images are listed as odd, and are chosen as diverse among those to train on.
    """
    near, cosines = find_neighbours(ids, features)
    others = near != ids[:, None]
    pairs = _list_pairs(ids, near, cosines, others & (near >= 0) & (cosines >= similarity))
    in_train = {image_id: split == "train" for image_id, split in split_of.items()}
    leaks = tuple(pair for pair in pairs if in_train[pair.first] != in_train[pair.second])
    return LookFindings(
        pairs,
        leaks,
        _rank_odd(ids, cosines, others, odd),
        choose_diverse(*_select_train(ids, features, in_train), diverse),
        frozenset(_find_redundant(pairs, in_train)),
    )


def find_neighbours(ids: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (n, k) ids of the images nearest to each of (n,) ids with (n, d) features, and their (n, k) cosines.

    An image is its own nearest, unless others have the same features; k is `NUM_COMPARED` + 1, or n where it is less.
    """
    index = FeatureIndex.from_features(ids, torch.from_numpy(features))
    return index.search(features, min(NUM_COMPARED + 1, len(ids)))


def _list_pairs(ids: np.ndarray, near: np.ndarray, cosines: np.ndarray, is_near: np.ndarray) -> tuple[ImagePair, ...]:
    found = dict[tuple[int, int], float]()
    for row, column in zip(*np.nonzero(is_near), strict=True):
        pair = sorted((int(ids[row]), int(near[row, column])))
        found[pair[0], pair[1]] = float(cosines[row, column])
    ranked = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple(ImagePair(first, second, cosine) for (first, second), cosine in ranked)


def _rank_odd(ids: np.ndarray, cosines: np.ndarray, others: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """Returns the images with the lowest mean cosine to their nearest others."""
    means = [
        float(row[mine][:NUM_ODD_NEIGHBOURS].mean()) if mine.any() else 1.0
        for row, mine in zip(cosines, others, strict=True)
    ]
    order = np.argsort(means, kind="stable")[:count]
    return tuple((int(ids[k]), means[k]) for k in order)


def _select_train(ids: np.ndarray, features: np.ndarray, in_train: Mapping[int, bool]) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.array([in_train[image_id] for image_id in ids.tolist()], bool)
    return ids[chosen], features[chosen]


def choose_diverse(ids: np.ndarray, features: np.ndarray, count: int) -> tuple[int, ...]:
    """Returns up to `count` of the ids by k-centre greedy selection (Gonzalez 1985; Sener and Savarese 2018).

    Each is the one whose cosine to its nearest chosen image is the lowest; the first is nearest to the mean.
    """
    if not len(ids):
        return ()
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    chosen = [int(np.argmax(unit @ unit.mean(0)))]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < min(count, len(ids)):
        nearest[chosen[-1]] = np.inf
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, unit @ unit[chosen[-1]])
    return tuple(int(ids[k]) for k in chosen)


def _find_redundant(pairs: tuple[ImagePair, ...], in_train: Mapping[int, bool]) -> set[int]:
    """Returns the images to train on that can be left out, so that no pair is left with one of them in it."""
    found = {one for pair in pairs for one, other in _both_ways(pair) if in_train[one] and not in_train[other]}
    # The later of two images to train on goes, unless one of them is gone already.
    for pair in sorted(pairs, key=lambda pair: (pair.second, pair.first)):
        if in_train[pair.first] and in_train[pair.second] and not {pair.first, pair.second} & found:
            found.add(pair.second)
    return found


def _both_ways(pair: ImagePair) -> tuple[tuple[int, int], tuple[int, int]]:
    return (pair.first, pair.second), (pair.second, pair.first)
