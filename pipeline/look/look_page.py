"""The page of a look: statistics, a map, near duplicates, leaks, odd ones out and a diverse subset, in one file."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.image_statistics import describe_statistics
from firstlight.pipeline.data.manifest import QUARANTINE_FILE
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look.findings import ImagePair, LookFindings
from firstlight.pipeline.look.image_lists import ImageLister
from firstlight.pipeline.look.pixel_features import ThumbnailReader
from firstlight.pipeline.report.html_page import (
    Block,
    Facts,
    MapPoint,
    Page,
    PageSection,
    PointMap,
    Strip,
    StripItem,
    Text,
    format_date,
    render_page,
)
from firstlight.pipeline.report.page_parts import quarantine_blocks
from firstlight.pipeline.stages.features.projection import project_to_plane
from firstlight.pipeline.terminal import format_count

# Images on the map, and pairs, odd ones and chosen ones that are shown.
MAX_MAP_IMAGES, MAX_SHOWN_PAIRS, MAX_SHOWN_IMAGES = 1500, 36, 36
# Classes that have a colour of their own on the map.
MAX_MAP_CLASSES = 10


@dataclass(frozen=True)
class LookFacts:
    """Everything that a page shows. `features_text` says what they are made of."""

    data: Path
    store: Store
    ids: np.ndarray
    features: np.ndarray
    features_text: str
    similarity: float
    findings: LookFindings
    lister: ImageLister
    unique_file: Path
    diverse_file: Path


def describe_findings(facts: LookFacts) -> list[str]:
    """Returns a line for each finding."""
    found, total = facts.findings, sum(facts.store.splits.values())
    counts = ", ".join(f"{count:,} {split}" for split, count in facts.store.splits.items() if count)
    seen = "" if len(facts.ids) == total else f"; {len(facts.ids):,} of them were compared"
    pixels = facts.store.stated_pixels
    each = "" if pixels is None else f"; each has {pixels}"
    copies = facts.store.images["duplicates"]
    pairs, redundant = format_count(len(found.near_duplicates), "pair"), format_count(len(found.redundant), "image")
    return [
        f"images: {counts}{seen}{each}; {facts.store.quarantined:,} cannot be decoded",
        f"exact copies: {copies['copies']:,}, {copies['of_train_in_test']:,} of them in test and in train",
        f"near duplicates: {pairs} with a cosine of {facts.similarity:g} or more, {len(found.leaks):,} of them between "
        "train and another split",
        f"to leave out: {redundant} to train on: {facts.unique_file} lists the others",
        f"diverse: {facts.diverse_file} lists {len(found.diverse):,} images that are far from each other",
    ]


def render_look(facts: LookFacts) -> str:
    """Returns the page as HTML, with all pictures in it."""
    found = facts.findings
    plane = select_evenly_spaced(np.arange(len(facts.ids)), MAX_MAP_IMAGES)
    shown = {
        *facts.ids[plane].tolist(),
        *(
            one
            for pair in (*found.near_duplicates[:MAX_SHOWN_PAIRS], *found.leaks[:MAX_SHOWN_PAIRS])
            for one in (pair.first, pair.second)
        ),
        *(image_id for image_id, _ in found.odd[:MAX_SHOWN_IMAGES]),
        *found.diverse[:MAX_SHOWN_IMAGES],
    }
    reader = ThumbnailReader(facts.store)
    thumbnails = reader.read(np.array(sorted(shown), np.int64))
    pictures = reader.shown.describe() if reader.shown is not None else ""
    sections = [
        PageSection("At a glance", [Facts([_split_finding(line) for line in describe_findings(facts)[:3]])]),
        PageSection("Map", [_map_block(facts, plane, thumbnails)]),
        PageSection("Near duplicates", _pair_blocks(facts, found.near_duplicates, thumbnails)),
        PageSection("Between train and other splits", _leak_blocks(facts, thumbnails)),
        PageSection("Odd ones out", _odd_blocks(facts, thumbnails)),
        PageSection("A diverse subset", _diverse_blocks(facts, thumbnails)),
        PageSection("Statistics", _statistics_blocks(facts)),
    ]
    page = Page(
        facts.data.resolve().name,
        "A look at images",
        f"{facts.data.resolve()}; features: {facts.features_text}{f'; pictures: {pictures}' * bool(pictures)}.",
        sections,
        foot=f"Written by Firstlight on {format_date(time.time())}.",
    )
    return render_page(page)


def _split_finding(line: str) -> tuple[str, str]:
    name, _, text = line.partition(": ")
    return name, text


def _map_block(facts: LookFacts, plane: np.ndarray, thumbnails: Mapping[int, str]) -> Block:
    points, axes = project_to_plane(facts.features[plane], "tsne")
    low, high = points.min(0), points.max(0)
    # A margin keeps whole points inside.
    places = 0.02 + 0.96 * (points - low) / np.maximum(high - low, 1e-9)
    labels, classes = facts.store.labels(), facts.store.classes
    names = list(classes[:MAX_MAP_CLASSES])
    if len(classes) > MAX_MAP_CLASSES:
        names.append("other classes")
    drawn = []
    for image_id, (x, y) in zip(facts.ids[plane].tolist(), places.tolist(), strict=True):
        label = int(labels[image_id])
        kind = min(label, MAX_MAP_CLASSES) if label >= 0 else 0
        drawn.append(MapPoint(x, 1.0 - y, kind, thumbnails[image_id], _name_image(facts, image_id)))
    caption = (
        f"{len(drawn):,} images on a plane ({axes[0].rsplit(' ', 1)[0]}): neighbours look alike. Point at one, or "
        "touch it, to see it."
    )
    return PointMap(caption, names, drawn)


def _name_image(facts: LookFacts, image_id: int) -> str:
    path, label = facts.lister.rows[image_id]
    name = Path(path).name if path else f"image {image_id}"
    return f"{name}{f', {label}' if label else ''}"


def _pair_blocks(facts: LookFacts, pairs: Sequence[ImagePair], thumbnails: Mapping[int, str]) -> list[Block]:
    if not pairs:
        return [Text(f"No two images have a cosine of {facts.similarity:g} or more.", "quiet")]
    items = [
        StripItem(
            [thumbnails[pair.first], thumbnails[pair.second]],
            f"{pair.cosine:.3f}: {_name_image(facts, pair.first)} and {_name_image(facts, pair.second)}",
        )
        for pair in pairs[:MAX_SHOWN_PAIRS]
    ]
    shown = (
        f"The first {len(items)} of {len(pairs):,} pairs"
        if len(pairs) > len(items)
        else format_count(len(pairs), "pair")
    )
    return [Text(f"{shown}, by their cosine."), Strip(items)]


def _leak_blocks(facts: LookFacts, thumbnails: Mapping[int, str]) -> list[Block]:
    if sum(count > 0 for count in facts.store.splits.values()) < 2:
        return []
    if not facts.findings.leaks:
        return [Text("No image to train on is near one of another split.", "quiet")]
    return [
        Text("A score on such images measures what was remembered."),
        *_pair_blocks(facts, facts.findings.leaks, thumbnails),
    ]


def _odd_blocks(facts: LookFacts, thumbnails: Mapping[int, str]) -> list[Block]:
    items = [
        StripItem([thumbnails[image_id]], f"{cosine:.2f}: {_name_image(facts, image_id)}")
        for image_id, cosine in facts.findings.odd[:MAX_SHOWN_IMAGES]
    ]
    return [Text("Images that are least like their nearest, with the mean cosine to these."), Strip(items)]


def _diverse_blocks(facts: LookFacts, thumbnails: Mapping[int, str]) -> list[Block]:
    chosen = facts.findings.diverse
    items = [StripItem([thumbnails[image_id]], _name_image(facts, image_id)) for image_id in chosen[:MAX_SHOWN_IMAGES]]
    command = f"firstlight pretrain --data {shlex.quote(str(facts.diverse_file))} --out first"
    return [
        Text(f"The first {len(items)} of {len(chosen):,} images to train on that are far from each other (k-centre)."),
        Text(command, "code"),
        Strip(items),
    ]


def _statistics_blocks(facts: LookFacts) -> list[Block]:
    lines = describe_statistics(facts.store.images, facts.store.splits)
    return [
        Facts(
            [("read as", line) for line in facts.store.source.get("reading", ())] + [("found", line) for line in lines]
        ),
        *quarantine_blocks(facts.store.path / QUARANTINE_FILE),
    ]
