"""Statistics of parts add up to those of all images, and are described in a few lines."""

import io
import json
import math
from collections import Counter

import numpy as np

from firstlight.pipeline.data.image_statistics import (
    BINS_PER_OCTAVE,
    ImageStatistics,
    SourceStatistics,
    describe_statistics,
    side_bin,
)
from firstlight.pipeline.report import figures

SPLITS = {"train": 150, "test": 50}


def images(count: int, seed: int) -> list[tuple[tuple[int, int], tuple[str, str], int, int]]:
    random = np.random.default_rng(seed)
    sides, kinds = random.integers(1, 5000, (count, 2)).tolist(), [("RGB", "JPEG"), ("L", "PNG"), ("RGBA", "PNG")]
    return [
        ((w, h), kinds[k], label, w)
        for (w, h), k, label in zip(sides, random.integers(0, 3, count), random.integers(-1, 4, count), strict=True)
    ]


def dumped(seen: list[tuple[tuple[int, int], tuple[str, str], int, int]]) -> dict:
    statistics = ImageStatistics()
    for size, kind, label, count in seen:
        statistics.add(size, kind, int(label), count)
    return json.loads(json.dumps(statistics.dump()))


def total(parts: list[tuple[str, dict]]) -> dict:
    found = SourceStatistics()
    for split, raw in parts:
        found.add(split, raw)
    return json.loads(json.dumps(found.dump()))


def test_statistics_of_parts_add_up() -> None:
    seen = images(200, 0)
    empty = dumped([])
    train, test = dumped(seen[:150]), dumped(seen[150:])
    found = total([("train", dumped(seen[:70])), ("train", empty), ("train", dumped(seen[70:150])), ("test", test)])
    assert total([("test", test), ("train", train)]) == found  # in whatever order they are done
    whole = dumped(seen)
    assert {k: v for k, v in found.items() if k != "labels"} == {k: v for k, v in whole.items() if k != "labels"}
    assert whole["width"] == [min(w for (w, _), *_ in seen), max(w for (w, _), *_ in seen)]
    assert whole["height"] == [min(h for (_, h), *_ in seen), max(h for (_, h), *_ in seen)]
    assert sum(count for *_, count in whole["sizes"]) == 200
    for split, raw in (("train", train), ("test", test)):
        counts = dict(raw["labels"])
        known = [n for label, n in counts.items() if label >= 0]
        assert found["labels"][split] == {"unknown": counts[-1], "classes": 4, "fewest": min(known), "most": max(known)}


def test_side_bin_contains_its_pixels() -> None:
    for pixels in (*range(1, 600), 65_535, 65_536, 64_000_000):
        k = side_bin(pixels)
        assert 2 ** (k / BINS_PER_OCTAVE) <= pixels * (1 + 1e-12)
        assert pixels < 2 ** ((k + 1) / BINS_PER_OCTAVE)
    assert [side_bin(2**k) for k in range(20)] == [BINS_PER_OCTAVE * k for k in range(20)]
    assert math.isclose(2 ** (side_bin(32) / BINS_PER_OCTAVE), 32)


def test_statistics_are_described_in_lines() -> None:
    same = total(
        [
            ("train", dumped([((8, 8), ("L", "PNG"), k % 3, 100) for k in range(1500)])),
            ("test", dumped([((8, 8), ("L", "PNG"), -1, 100)])),
        ]
    )
    assert describe_statistics(same, {"train": 1500, "test": 1}) == [
        "train 1,500, test 1 images of 8 x 8 pixels, 0.1 kB each on average",
        "format PNG; mode L",
        "train: 3 classes of 500 images",
    ]
    mixed = [((8, 9), ("RGB", "JPEG"), 0, 5000)] * 1999 + [((1000, 2000), ("L", "PNG"), -1, 5000)]
    assert describe_statistics(total([("train", dumped(mixed))]), {"train": 2000}) == [
        "train 2,000 images of 8 to 1,000 x 9 to 2,000 pixels, 5.0 kB each on average",
        "format JPEG 100.0%, PNG <0.1%; mode RGB 100.0%, L <0.1%",
        "train: 1 classes of 1,999 images, 1 images without a label",
    ]


def test_figure_counts_every_image() -> None:
    seen = dumped([*images(300, 1), ((1, 64_000_000), ("F", "TIFF"), 0, 1)])
    figure = figures.draw_store_statistics({**seen, "duplicates": {"copies": 1234}}, 5)
    assert figure.get_suptitle() == "1,234 are copies of others; 5 more cannot be decoded"
    sizes, modes, formats, _ = figure.axes
    assert sizes.get_title(loc="left").startswith("301 images: 1-")
    assert sizes.collections[0].get_array().sum() == 301
    for axis, key in ((modes, "modes"), (formats, "formats")):
        assert {
            label.get_text(): bar.get_height() for label, bar in zip(axis.get_xticklabels(), axis.patches, strict=True)
        } == seen[key]
    figure.savefig(io.BytesIO(), format="png")  # also of an image of one column


def test_figure_counts_values_without_own_bar() -> None:
    seen = dumped([((8, 8), (f"M{k}", "PNG"), 0, 1) for k in range(10) for _ in range(20 - k)])
    modes = figures.draw_store_statistics(seen, 0).axes[1]
    assert [label.get_text() for label in modes.get_xticklabels()] == [*(f"M{k}" for k in range(7)), "others"]
    assert sum(bar.get_height() for bar in modes.patches) == sum(range(11, 21))


def test_annotations_are_counted_and_described_by_split() -> None:
    statistics = ImageStatistics()
    for k in range(4):
        statistics.add(
            (8, 8),
            ("L", "PNG"),
            -1,
            100,
            Counter({("present", 0): 1, ("boxes", 0): 2, ("boxes", 1): k, ("difficult", 1): k // 3}),
        )
    masks = ImageStatistics()
    masks.add((8, 8), ("L", "PNG"), -1, 100, Counter({("pixels", 0): 30, ("pixels", 10): 31, ("pixels", 255): 3}))
    found = total(
        [
            ("train", json.loads(json.dumps(statistics.dump()))),
            ("train", dumped([])),
            ("test", json.loads(json.dumps(masks.dump()))),
        ]
    )
    assert found["annotated"] == {
        "train": {"boxes": {"0": 8, "1": 6}, "difficult": {"1": 1}, "present": {"0": 4}},
        "test": {"pixels": {"0": 30, "10": 31, "255": 3}},
    }
    assert describe_statistics(found, {"train": 4, "test": 1})[2:] == [
        "train: 1 classes, each in 4 images; an image can have several",
        "train: 14 boxes of 2 classes, 1 of them difficult",
        "test: masks of 2 classes; 4.7% of their pixels are void",
    ]
