"""Facts of a look at thirty digits, whose images have no files of their own."""

from pathlib import Path

import numpy as np

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look.findings import ImagePair, LookFindings
from firstlight.pipeline.look.image_lists import ImageLister
from firstlight.pipeline.look.look_page import LookFacts


def make_look_facts(folder: Path, digits: Store) -> LookFacts:
    """Ten images to train on and twenty of test: the first two and the last are near each other."""
    ids = np.sort(np.concatenate([digits.ids("train")[:20:2], digits.ids("test")[:20]]))
    features = np.random.default_rng(0).standard_normal((len(ids), 8)).astype(np.float32)
    first, second, test = (int(one) for one in (ids[0], ids[1], ids[-1]))
    features[1] = features[0] * 2
    features[-1] = features[1] + 1e-4
    pairs = (ImagePair(first, second, 1.0), ImagePair(second, test, 0.999), ImagePair(first, test, 0.999))
    found = LookFindings(pairs, pairs[1:], ((int(ids[3]), 0.25),), (int(ids[4]),), frozenset({second}))
    lister = ImageLister(digits, folder, ids)
    return LookFacts(folder, digits, ids, features, "pixels", 0.97, found, lister, folder / "a.csv", folder / "b.csv")
