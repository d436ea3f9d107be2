"""Statistics of the images of a store: counted while they are decoded, part by part, and added up for the manifest."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from firstlight.pipeline.data.channels.channel_counts import ChannelCounts, describe_channels
from firstlight.pipeline.data.images.class_maps import VOID_VALUE
from firstlight.pipeline.data.images.colours import ColourSums
from firstlight.pipeline.data.images.levels import LevelCounts

# Number of bins of width and of height between a number of pixels and its double.
BINS_PER_OCTAVE = 4
SHRUNK_COUNTS = ("images", "source_bytes", "stored_bytes")
JsonDict = dict[str, Any]


@dataclass
class ImageStatistics:
    """Counts over some images. The size of the object does not grow with the number of images."""

    # Smallest width and smallest height; 0 if there is no image yet.
    low: tuple[int, int] = (0, 0)
    # Largest width and largest height.
    high: tuple[int, int] = (0, 0)
    # Bytes of the encoded images.
    bytes: int = 0
    # `side_bin` of width and of height.
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    # Pillow's modes.
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    # Result of `count_annotations`.
    annotated: Counter[tuple[str, int]] = field(default_factory=Counter)
    # The conventions that were assumed, by the names of `readings.READING_SENTENCES`.
    readings: Counter[str] = field(default_factory=Counter)
    # Images that cannot be used, by `BadImage.kind`.
    refused: Counter[str] = field(default_factory=Counter)
    # Levels of images with more than 8 bits a sample, by kind.
    levels: dict[str, LevelCounts] = field(default_factory=dict)
    colours: ColourSums = field(default_factory=ColourSums)
    # The counts of images with their channels as they are.
    channels: ChannelCounts = field(default_factory=ChannelCounts)
    # Images that are stored smaller than they are in the source: `images`, their `source_bytes`, their `stored_bytes`.
    shrunk: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        size: tuple[int, int],
        kind: tuple[str, str],
        label: int,
        num_bytes: int,
        annotated: Counter[tuple[str, int]] | None = None,
    ) -> None:
        """Counts one image. `size` is (width, height), `kind` is (mode, format)."""
        self._extend_range(size, size)
        self.bytes += num_bytes
        self.sizes[side_bin(size[0]), side_bin(size[1])] += 1
        self.modes[kind[0]] += 1
        self.formats[kind[1]] += 1
        self.labels[label] += 1
        self.annotated.update(annotated or {})

    def add_shrunk(self, source_bytes: int, stored_bytes: int) -> None:
        """Counts an image that is stored smaller than it is in the source."""
        self.shrunk.update(images=1, source_bytes=source_bytes, stored_bytes=stored_bytes)

    def add_levels(self, kind: str, low: float, high: float) -> None:
        """Counts the lowest and the highest level of an image with more than 8 bits a sample."""
        self.levels.setdefault(kind, LevelCounts()).add_image(low, high)

    def _extend_range(self, low: tuple[int, int], high: tuple[int, int]) -> None:
        self.low = (min(self.low[0], low[0]), min(self.low[1], low[1])) if self.low[0] else low
        self.high = (max(self.high[0], high[0]), max(self.high[1], high[1]))

    def dump(self) -> JsonDict:
        """Returns the statistics as JSON, for `merge`."""
        # Ordinary sets have none of these.
        odd = {
            "annotated": [[*key, count] for key, count in sorted(self.annotated.items())],
            "readings": dict(sorted(self.readings.items())),
            "refused": dict(sorted(self.refused.items())),
            "shrunk": dict(sorted(self.shrunk.items())),
            "level_counts": {kind: counts.dump_counts() for kind, counts in sorted(self.levels.items())},
            "pixels": self.channels.dump_counts(),
        }
        return {
            "width": [self.low[0], self.high[0]],
            "height": [self.low[1], self.high[1]],
            "bytes": self.bytes,
            "sizes": [[*bins, count] for bins, count in sorted(self.sizes.items())],
            "modes": dict(sorted(self.modes.items())),
            "formats": dict(sorted(self.formats.items())),
            "labels": [list(pair) for pair in sorted(self.labels.items())],
            "colours": self.colours.dump_sums(),
            **{key: value for key, value in odd.items() if value},
        }

    def merge(self, raw: Mapping[str, Any]) -> None:
        """Adds the statistics that another object dumped."""
        if raw["width"][0]:
            self._extend_range((raw["width"][0], raw["height"][0]), (raw["width"][1], raw["height"][1]))
        self.bytes += raw["bytes"]
        self.sizes.update({(width, height): count for width, height, count in raw["sizes"]})
        self.modes.update(raw["modes"])
        self.formats.update(raw["formats"])
        self.labels.update(dict(raw["labels"]))
        self.annotated.update({(kind, known): count for kind, known, count in raw.get("annotated", ())})
        self.readings.update(raw.get("readings", {}))
        self.refused.update(raw.get("refused", {}))
        self.shrunk.update({key: count for key, count in raw.get("shrunk", {}).items() if key in SHRUNK_COUNTS})
        if "colours" in raw:
            self.colours.merge_sums(raw["colours"])
        self.channels.merge_counts(raw.get("pixels") or {})
        for kind, counts in raw.get("level_counts", {}).items():
            self.levels.setdefault(kind, LevelCounts()).merge_counts(counts)


def side_bin(pixels: int) -> int:
    """Returns the k with 2 ** (k / BINS_PER_OCTAVE) <= pixels < 2 ** ((k + 1) / BINS_PER_OCTAVE)."""
    return math.floor(BINS_PER_OCTAVE * math.log2(pixels))


def last_in_bin(number: int) -> int:
    """Returns the largest number of pixels whose `side_bin` is `number`."""
    return math.ceil(2 ** ((number + 1) / BINS_PER_OCTAVE)) - 1


@dataclass
class SourceStatistics:
    """Statistics of a whole source and of each split; adds up the dumps of its parts, in any order."""

    whole: ImageStatistics = field(default_factory=ImageStatistics)
    splits: dict[str, ImageStatistics] = field(default_factory=dict)

    def add(self, split: str, raw: Mapping[str, Any]) -> None:
        self.whole.merge(raw)
        self.splits.setdefault(split, ImageStatistics()).merge(raw)

    def dump(self) -> JsonDict:
        """Returns the entry of the manifest. Labels are summarised per split, so that many classes take no space."""
        facts = {key: value for key, value in self.whole.dump().items() if key not in ("labels", "annotated")}
        # A network's input is normalised by the images that it is trained on.
        facts["colours"] = self.splits.get("train", ImageStatistics()).colours.dump_sums()
        splits = sorted(self.splits.items(), reverse=True)
        annotated = {split: _group_by_kind(found.annotated) for split, found in splits if found.annotated}
        return {
            **facts,
            "labels": {split: _summarise_labels(found.labels) for split, found in splits},
            **({"annotated": annotated} if annotated else {}),
        }


def _group_by_kind(annotated: Counter[tuple[str, int]]) -> JsonDict:
    """Returns kind -> class (as text, because it is a key of JSON) -> count."""
    return {
        kind: {str(c): n for (of, c), n in sorted(annotated.items()) if of == kind}
        for kind in sorted({kind for kind, _ in annotated})
    }


def _summarise_labels(found: Counter[int]) -> JsonDict:
    known = [count for label, count in found.items() if label >= 0]
    return {"unknown": found[-1], "classes": len(known), "fewest": min(known, default=0), "most": max(known, default=0)}


def describe_statistics(images: Mapping[str, Any], splits: Mapping[str, int]) -> list[str]:
    """Returns the manifest's entry as text: two lines, one per split with labels, one per kind of annotation.

    `splits`: the number of images of each split.
    """
    count = sum(splits.values())
    lines = [
        f"{', '.join(f'{name} {n:,}' for name, n in splits.items())} images "
        f"of {_format_range(images['width'])} x {_format_range(images['height'])} pixels, "
        f"{images['bytes'] / count / 1000:,.1f} kB each on average",
        f"format {_format_shares(images['formats'], count)}; mode {_format_shares(images['modes'], count)}",
        *describe_shrinking(images, count),
        *describe_channels(images),
    ]
    for split, found in images["labels"].items():
        if found["classes"]:
            unknown = f", {found['unknown']:,} images without a label" if found["unknown"] else ""
            sizes = _format_range([found["fewest"], found["most"]])
            lines.append(f"{split}: {found['classes']:,} classes of {sizes} images{unknown}")
    for split, kinds in images.get("annotated", {}).items():
        lines += [f"{split}: {line}" for line in _describe_annotations(kinds)]
    return lines


def describe_shrinking(images: Mapping[str, Any], count: int) -> list[str]:
    """Returns a line about the images that are stored smaller than they are in the source, of `count`; none without."""
    found = images.get("shrunk", {})
    if not found.get("images"):
        return []
    before, after = found["source_bytes"], found["stored_bytes"]
    return [
        f"{found['images']:,} of {count:,} images are stored with a shorter side of {found['side']:,} pixels "
        f"(dataset.store_size): {after / 1e6:,.1f} MB instead of {before / 1e6:,.1f} MB, JPEG of quality "
        f"{found['quality']} with whole colour, or PNG for files without loss"
    ]


def _describe_annotations(kinds: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns a line for each kind of annotation that the store has."""
    lines = []
    if present := kinds.get("present"):
        images = _format_range([min(present.values()), max(present.values())])
        lines.append(f"{len(present):,} classes, each in {images} images; an image can have several")
    if boxes := kinds.get("boxes"):
        num_difficult = sum(kinds.get("difficult", {}).values())
        difficult = f", {num_difficult:,} of them difficult" if num_difficult else ""
        lines.append(f"{sum(boxes.values()):,} boxes of {len(boxes):,} classes{difficult}")
    if pixels := kinds.get("pixels"):
        void = pixels.get(str(VOID_VALUE), 0) / sum(pixels.values())
        num_classes = len(pixels.keys() - {str(VOID_VALUE)})
        lines.append(f"masks of {num_classes:,} classes; {_format_percent(void)} of their pixels are void")
    return lines


def _format_range(ends: list[int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"


def _format_shares(counts: Mapping[str, int], total: int) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    if len(ordered) == 1:
        return ordered[0][0]
    return ", ".join(f"{name} {_format_percent(n / total)}" for name, n in ordered[:6])


def _format_percent(share: float) -> str:
    return "<0.1%" if 0.0 < share < 0.001 else f"{share:.1%}"
