"""The format that the images of a source share where they are no colour images, by the headers of some of them."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from firstlight.pipeline.data.channels.file_format import read_file_format
from firstlight.pipeline.data.channels.pixel_format import FileFormat, PixelFormat
from firstlight.pipeline.data.channels.tiff_samples import is_tiff
from firstlight.pipeline.data.images import BadImage, ImageHeader, read_header
from firstlight.pipeline.data.images.formats import is_dicom
from firstlight.pipeline.data.sources import Record, Source, SourcePart


@dataclass(frozen=True)
class ProbedImage:
    """An image of a source as its header declares it.

    `header`: None if it cannot be read as colours. `own_format`: that of the file's own pixels, where it cannot be read
    as colours or has several grey pages, of which colours would be the first. `reason`: why there is neither.
    """

    path: str
    header: ImageHeader | None
    own_format: FileFormat | None
    reason: str = ""

    @property
    def is_colour(self) -> bool:
        """True if it is to be read as colours."""
        return self.header is not None and self.own_format is None


@dataclass(frozen=True)
class SharedFormat:
    """The format of most images, with their number among those that were tried."""

    pixels: PixelFormat
    num_images: int
    num_tried: int
    # The median of the images' shorter sides, in pixels.
    side: int

    def __str__(self) -> str:
        """Returns the format, and the number of images that have it unless all have."""
        share = f" in {self.num_images:,} of {self.num_tried:,} that were tried" * (self.num_images < self.num_tried)
        return f"{self.pixels}{share}"


def probe_images(source: Source, positions: Iterable[int]) -> Iterator[ProbedImage]:
    """Yields what the headers of the training images at some positions declare."""
    for position in positions:
        for record in source.read(SourcePart("train", position, 1)):
            yield _probe(record)


def _probe(record: Record) -> ProbedImage:
    data = record.data
    if data is None:
        return ProbedImage(record.path, None, None, str(record.reason))
    header, own, reasons = None, None, list[str]()
    try:
        header = read_header(data)
    except BadImage as error:
        reasons.append(str(error))
    if header is None or is_tiff(data):
        try:
            own = read_file_format(data)
        except BadImage as error:
            reasons.append(str(error))
    if header is not None:
        return ProbedImage(record.path, header, own if own is not None and own.is_stack else None)
    # The reading with its channels alone says more about a file that is read in this way.
    return ProbedImage(
        record.path, None, own, "" if own is not None else reasons[-1 if is_tiff(data) or is_dicom(data) else 0]
    )


def find_shared_format(probed: Iterable[ProbedImage]) -> SharedFormat | None:
    """Returns the format that most images share, the earlier found of two; None if they are to be read as colours.

    They are if one of them can be, or if the pages of TIFF files have several formats: then the first page is read.
    """
    formats, num_tried, has_headers = list[FileFormat](), 0, False
    for image in probed:
        if image.is_colour:
            return None
        num_tried += 1
        has_headers = has_headers or image.header is not None
        formats += [image.own_format] if image.own_format is not None else []
    if not formats:
        return None
    pixels, num_images = Counter(one.pixels for one in formats).most_common(1)[0]
    if has_headers and num_images < num_tried:
        return None
    side = int(statistics.median(min(one.size) for one in formats if one.pixels == pixels))
    return SharedFormat(pixels, num_images, num_tried, side)
