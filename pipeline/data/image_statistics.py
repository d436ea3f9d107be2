"""What the images of a store are like: counted while they are decoded, part by part, and added up for the manifest."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from firstlight.pipeline.data.annotations import VOID

OCTAVE = 4  # bins of width and of height between a number of pixels and its double
Json = dict[str, Any]


@dataclass
class Census:
    """Of some images: sizes (width, height in bins of `side_bin`), Pillow's modes, formats, labels, encoded bytes. Small, however many they are."""

    low: tuple[int, int] = (0, 0)  # smallest width, smallest height; 0: no image yet
    high: tuple[int, int] = (0, 0)
    bytes: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    annotated: Counter[tuple[str, int]] = field(default_factory=Counter)  # as `annotations.tally`

    def add(
        self,
        size: tuple[int, int],
        kind: tuple[str, str],
        label: int,
        count: int,
        annotated: Counter[tuple[str, int]] | None = None,
    ) -> None:
        """One image of (width, height), (mode, format), and `count` encoded bytes."""
        self._stretch(size, size)
        self.bytes += count
        self.sizes[side_bin(size[0]), side_bin(size[1])] += 1
        self.modes[kind[0]] += 1
        self.formats[kind[1]] += 1
        self.labels[label] += 1
        self.annotated.update(annotated or {})

    def _stretch(self, low: tuple[int, int], high: tuple[int, int]) -> None:
        self.low = (min(self.low[0], low[0]), min(self.low[1], low[1])) if self.low[0] else low
        self.high = (max(self.high[0], high[0]), max(self.high[1], high[1]))

    def dump(self) -> Json:
        return {
            "width": [self.low[0], self.high[0]],
            "height": [self.low[1], self.high[1]],
            "bytes": self.bytes,
            "sizes": [[*bins, count] for bins, count in sorted(self.sizes.items())],
            "modes": dict(sorted(self.modes.items())),
            "formats": dict(sorted(self.formats.items())),
            "labels": [list(pair) for pair in sorted(self.labels.items())],
            **(
                {"annotated": [[*key, count] for key, count in sorted(self.annotated.items())]}
                if self.annotated
                else {}
            ),
        }

    def merge(self, raw: Mapping[str, Any]) -> None:
        """Count in what another one dumped."""
        if raw["width"][0]:
            self._stretch((raw["width"][0], raw["height"][0]), (raw["width"][1], raw["height"][1]))
        self.bytes += raw["bytes"]
        self.sizes.update({(width, height): count for width, height, count in raw["sizes"]})
        self.modes.update(raw["modes"])
        self.formats.update(raw["formats"])
        self.labels.update(dict(raw["labels"]))
        self.annotated.update({(kind, known): count for kind, known, count in raw.get("annotated", ())})


def side_bin(pixels: int) -> int:
    """The k with 2 ** (k / OCTAVE) <= pixels < 2 ** ((k + 1) / OCTAVE)."""
    return math.floor(OCTAVE * math.log2(pixels))


@dataclass
class Total:
    """Of a whole source; adds up the dumps of its parts, in any order."""

    whole: Census = field(default_factory=Census)
    splits: dict[str, Census] = field(default_factory=dict)

    def add(self, split: str, raw: Mapping[str, Any]) -> None:
        self.whole.merge(raw)
        self.splits.setdefault(split, Census()).merge(raw)

    def dump(self) -> Json:
        """An entry of the manifest: the labels of each split are summed up, so that it stays small with many classes."""
        seen = {key: value for key, value in self.whole.dump().items() if key not in ("labels", "annotated")}
        splits = sorted(self.splits.items(), reverse=True)
        annotated = {split: _by_kind(found.annotated) for split, found in splits if found.annotated}
        return {
            **seen,
            "labels": {split: _labels(found.labels) for split, found in splits},
            **({"annotated": annotated} if annotated else {}),
        }


def _by_kind(annotated: Counter[tuple[str, int]]) -> Json:
    """Kind -> class (as text: keys of JSON) -> how many."""
    return {
        kind: {str(c): n for (of, c), n in sorted(annotated.items()) if of == kind}
        for kind in sorted({kind for kind, _ in annotated})
    }


def _labels(found: Counter[int]) -> Json:
    known = [count for label, count in found.items() if label >= 0]
    return {"unknown": found[-1], "classes": len(known), "fewest": min(known, default=0), "most": max(known, default=0)}


def lines(images: Mapping[str, Any], splits: Mapping[str, int]) -> list[str]:
    """The manifest's entry for a reader, with `splits` -> images of each: two lines, and one per split that has labels."""
    count = sum(splits.values())
    told = [
        f"{', '.join(f'{name} {n:,}' for name, n in splits.items())} images of {_range(images['width'])} x {_range(images['height'])} pixels, "
        f"{images['bytes'] / count / 1000:,.1f} kB each on average",
        f"format {_shares(images['formats'], count)}; mode {_shares(images['modes'], count)}",
    ]
    for split, found in images["labels"].items():
        if found["classes"]:
            unknown = f", {found['unknown']:,} images without a label" if found["unknown"] else ""
            told.append(
                f"{split}: {found['classes']:,} classes of {_range([found['fewest'], found['most']])} images{unknown}"
            )
    return told + [
        f"{split}: {line}" for split, kinds in images.get("annotated", {}).items() for line in _annotated(kinds)
    ]


def _annotated(kinds: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each kind of annotation that there is."""
    told = []
    if present := kinds.get("present"):
        told.append(
            f"{len(present):,} classes, each in {_range([min(present.values()), max(present.values())])} images, several in one"
        )
    if boxes := kinds.get("boxes"):
        difficult = sum(kinds.get("difficult", {}).values())
        hard = f", {difficult:,} of them difficult" if difficult else ""
        told.append(f"{sum(boxes.values()):,} boxes of {len(boxes):,} classes{hard}")
    if pixels := kinds.get("pixels"):
        void = pixels.get(str(VOID), 0) / sum(pixels.values())
        told.append(f"masks of {len(pixels.keys() - {str(VOID)}):,} classes; {_percent(void)} of their pixels are void")
    return told


def _range(ends: list[int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"


def _shares(counts: Mapping[str, int], total: int) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ordered[0][0] if len(ordered) == 1 else ", ".join(f"{name} {_percent(n / total)}" for name, n in ordered[:6])


def _percent(share: float) -> str:
    return "<0.1%" if share < 0.001 else f"{share:.1%}"
