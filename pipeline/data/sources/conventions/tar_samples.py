"""Samples of tar archives, as the library `webdataset` groups members: by their names up to the first dot.

`a/b/0001.jpg`, `a/b/0001.depth.png` and `a/b/0001.cls` are one sample with the key `a/b/0001` and three fields.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from firstlight.pipeline.data.sources.conventions.reading import join_counts
from firstlight.pipeline.errors import UserError

IMAGELESS_SAMPLE_REASON, SECOND_IMAGE_REASON, TWO_LABELS_REASON = (
    "the sample has no image",
    "is a second image of its sample",
    "the sample has two labels",
)
DEFAULT_IMAGE_FIELD = "image"
# The words that begin the name of a field such as image.jpg
IMAGE_FIELD_WORDS = {"image", "img", "rgb", "input"}
# A field beside others is the image if at least this share of the samples of the commonest field have it
MIN_FIELD_SHARE = 0.5


class ImageField(NamedTuple):
    """The field that is the image of each sample; None if no sample has two images. `beside` are left out."""

    name: str | None
    beside: frozenset[str] = frozenset()
    note: str = ""


@dataclass
class TarSample:
    """The members of an archive with one key, by field; each as its position in the archive."""

    images: dict[str, list[int]] = field(default_factory=dict)
    labels: dict[str, list[int]] = field(default_factory=dict)


def split_member_name(name: str, at_last_dot: bool = False) -> tuple[str, str]:
    """Returns the key and the field of a member. A field is in lower case, without its dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.rpartition(".") if at_last_dot else file.partition(".")
    return folder + slash + stem, extension.lower()


def has_dotted_keys(images: Iterable[str], labels: Sequence[str]) -> bool:
    """Returns True if keys have dots themselves, so that names are split at the last one.

    With `img.0001.jpg`, `img.0002.jpg` the first dot would make one sample of all: there are more fields than keys. The
    labels then belong to the images only by the last dot.
    """
    names = list(images)
    first, fields = ({part[k] for part in map(split_member_name, names)} for k in (0, 1))
    if len(names) < 2 * len(first) or len(fields) <= len(first):
        return False
    last = {split_member_name(name, at_last_dot=True)[0] for name in names}
    matched = sum(split_member_name(name, at_last_dot=True)[0] in last for name in labels)
    return len(last) == len(names) and 2 * matched >= len(labels)


def group_samples(
    images: Iterable[tuple[int, str]], labels: Iterable[tuple[int, str]], at_last_dot: bool
) -> dict[str, TarSample]:
    """Returns the samples of an archive by key, in the order of their first members.

    `images` and `labels`: position and name of each member.
    """
    listed = sorted([*((k, name, True) for k, name in images), *((k, name, False) for k, name in labels)])
    samples: dict[str, TarSample] = {}
    for position, name, is_image in listed:
        key, extension = split_member_name(name, at_last_dot)
        sample = samples.setdefault(key, TarSample())
        (sample.images if is_image else sample.labels).setdefault(extension, []).append(position)
    return samples


def choose_image_field(samples: Iterable[TarSample], wanted: str) -> ImageField:
    """Chooses the field that is the image: `wanted`, where it is none of the default, else the commonest.

    Raises:
        UserError: no sample has the field `wanted`, or it cannot be told which of several is the image.
    """
    counts, pairs, several = Counter[str](), Counter[frozenset[str]](), 0
    for sample in samples:
        counts.update(list(sample.images))
        several += len(sample.images) > 1
        if len(sample.images) > 1:
            pairs[frozenset(sample.images)] += 1
    if wanted.lower() in counts:
        name = wanted.lower()
    elif wanted != DEFAULT_IMAGE_FIELD:
        fields = join_counts(counts, 10) or "none"
        raise UserError(f"dataset.image_column: {wanted!r} is no field of a sample; fields with images: {fields}")
    elif not several:
        return ImageField(None)
    else:
        name = _find_common_field(counts)
    beside = frozenset(other for pair in pairs if name in pair for other in pair if other != name)
    left = {other: counts[other] for other in beside}
    note = f"the image of a sample is {name}; left out beside it: {join_counts(left)}" if left else ""
    return ImageField(name, beside, note)


def _find_common_field(counts: Counter[str]) -> str:
    most = max(counts.values())
    plain = {name: n for name, n in counts.items() if _is_plain_field(name) and n >= MIN_FIELD_SHARE * most}
    among = plain or dict(counts)
    best = [name for name, n in among.items() if n == max(among.values())]
    if len(best) > 1:
        raise UserError(
            f"dataset.image_column: samples have several images: {join_counts(counts, 10)}; "
            f"valid: dataset.image_column={best[0]} takes that field of each"
        )
    return best[0]


def _is_plain_field(name: str) -> bool:
    first, dot, _ = name.partition(".")
    return not dot or first in IMAGE_FIELD_WORDS


def choose_images(sample: TarSample, chosen: ImageField) -> Iterator[tuple[int, str | None]]:
    """Yields the position of each member of a sample that is listed, with the reason why it is not the image."""
    own = {name: places for name, places in sample.images.items() if name not in chosen.beside or name == chosen.name}
    if chosen.name is not None and chosen.name in own:
        own = {chosen.name: own[chosen.name]}
    places = sorted(place for of_field in own.values() for place in of_field)
    for k, place in enumerate(places):
        yield place, SECOND_IMAGE_REASON if k else None
    if not places and sample.images:
        yield (
            min(place for of_field in sample.images.values() for place in of_field),
            f"the sample has no {chosen.name}",
        )
