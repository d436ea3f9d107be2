"""The entries of tar archives: the image of each sample with its label, and the members that are refused."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.conventions.reading import count_things, join_counts
from firstlight.pipeline.data.sources.conventions.tar_samples import (
    IMAGELESS_SAMPLE_REASON,
    TWO_LABELS_REASON,
    ImageField,
    TarSample,
    choose_image_field,
    choose_images,
    group_samples,
    has_dotted_keys,
)
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.data.sources.tar_index import LABEL_FIELDS, ArchiveListing

KIND_NUMBERS = {"image": 0, "label": 1, "refused": 2}


@dataclass(frozen=True)
class ArchiveEntries:
    """n entries of archives, laid end to end."""

    # (n,)
    names: pa.BinaryArray
    # (n, 2) int64: offset and size of the bytes in the archive
    spans: np.ndarray
    # (n,)
    labels: pa.StringArray
    # Entry -> the reason why it is no image
    reasons: dict[int, str]


@dataclass(frozen=True)
class PackedListing:
    """The m members of an archive."""

    # (m,) of KIND_NUMBERS
    kinds: np.ndarray
    names: pa.StringArray
    # (m, 2) int64: offset and size
    spans: np.ndarray
    labels: pa.StringArray
    # Member -> why it is refused, or why its label cannot be read
    reasons: dict[int, str]
    left_out: Counter[str]
    json_fields: Counter[str]

    def list_names(self, kind: str) -> list[tuple[int, str]]:
        """Returns position and name of each member of a kind."""
        places = np.flatnonzero(self.kinds == KIND_NUMBERS[kind])
        return list(zip(places.tolist(), self.names.take(pa.array(places)).to_pylist(), strict=True))


def pack_listing(listing: ArchiveListing) -> PackedListing:
    members = listing.members
    return PackedListing(
        np.array([KIND_NUMBERS[member.kind] for member in members], np.int8),
        pa.array([member.name for member in members], pa.string()),
        np.array([(member.offset, member.size) for member in members], np.int64).reshape(-1, 2),
        pa.array([member.label for member in members], pa.string()),
        {k: member.reason for k, member in enumerate(members) if member.reason is not None},
        listing.left_out,
        listing.json_fields,
    )


@dataclass(frozen=True)
class ResolvedSamples:
    """The entries of all archives, (archives,) the number of entries up to the end of each, and notes."""

    entries: ArchiveEntries
    ends: np.ndarray
    notes: tuple[str, ...]


def resolve_samples(listings: Sequence[PackedListing], dataset: SourceOptions) -> ResolvedSamples:
    """Chooses the image of each sample, and its label.

    Raises:
        UserError: as `choose_image_field`.
    """
    images = [listing.list_names("image") for listing in listings]
    labels = [listing.list_names("label") for listing in listings]
    is_dotted = any(
        has_dotted_keys([name for _, name in own], [name for _, name in labelled])
        for own, labelled in zip(images, labels, strict=True)
    )
    samples = [group_samples(*pair, is_dotted) for pair in zip(images, labels, strict=True)]
    chosen = choose_image_field(
        (sample for of_archive in samples for sample in of_archive.values()), dataset.image_column
    )
    parts = [
        _list_entries(listing, of_archive, chosen, dataset.label_column)
        for listing, of_archive in zip(listings, samples, strict=True)
    ]
    ends = np.cumsum([len(part.names) for part in parts])
    reasons = {
        first + index: reason
        for first, part in zip([0, *ends.tolist()], parts, strict=False)
        for index, reason in part.reasons.items()
    }
    names, found = (pa.concat_arrays([getattr(part, key) for part in parts]) for key in ("names", "labels"))
    notes = [chosen.note] if chosen.note else []
    if is_dotted:
        notes.append("keys have dots: names are split at the last one")
    notes += _describe_json_fields(listings, dataset.label_column, found)
    return ResolvedSamples(
        ArchiveEntries(names, np.concatenate([part.spans for part in parts]), found, reasons), ends, tuple(notes)
    )


def _describe_json_fields(
    listings: Sequence[PackedListing], label_column: str | None, labels: pa.StringArray
) -> list[str]:
    fields: Counter[str] = sum((listing.json_fields for listing in listings), Counter())
    missed = [name for name in fields if name.startswith("dataset.label_column")]
    if missed:
        return [f"{name} in {count_things(fields[name], '.json file')}" for name in missed]
    if fields and labels.null_count == len(labels):
        return [
            f"no .json file has the field {label_column!r} (dataset.label_column); fields: {join_counts(fields, 10)}"
        ]
    return []


def _list_entries(
    listing: PackedListing, samples: dict[str, TarSample], chosen: ImageField, label_column: str | None
) -> ArchiveEntries:
    """Returns the samples of an archive in the order of their first members, then the members that are refused."""
    rows: list[tuple[int, str | None, str | None]] = []
    for sample in samples.values():
        label, problem = _read_sample_label(listing, sample, label_column)
        listed = list(choose_images(sample, chosen))
        if not listed and label is not None:
            first = min(place for places in sample.labels.values() for place in places)
            rows.append((first, label, IMAGELESS_SAMPLE_REASON))
        rows += [(place, label, reason or problem) for place, reason in listed]
    rows += [(place, None, listing.reasons[place]) for place, _ in listing.list_names("refused")]
    places = pa.array([place for place, _, _ in rows], pa.int64())
    return ArchiveEntries(
        listing.names.take(places).cast(pa.binary()),
        listing.spans[places.to_numpy()],
        pa.array([label for _, label, _ in rows], pa.string()),
        {k: reason for k, (_, _, reason) in enumerate(rows) if reason is not None},
    )


def _read_sample_label(
    listing: PackedListing, sample: TarSample, label_column: str | None
) -> tuple[str | None, str | None]:
    """Returns the label of a sample, and why it is not to be trusted."""
    for places in sample.labels.values():
        if problems := [listing.reasons[place] for place in places if place in listing.reasons]:
            return None, problems[0]
        if len({listing.labels[place].as_py() for place in places}) > 1:
            return listing.labels[places[0]].as_py(), TWO_LABELS_REASON
    # A field such as class.cls comes after cls
    order = {name: k for k, name in enumerate(dict.fromkeys(((label_column or "").lower(), *LABEL_FIELDS)))}
    for name in sorted(sample.labels, key=lambda name: (name.count("."), order[name.rpartition(".")[2]])):
        label = listing.labels[sample.labels[name][0]].as_py()
        if label is not None:
            return str(label), None
    return None, None
