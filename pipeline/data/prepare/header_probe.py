"""Headers of some images of a source, read before its store is written."""

from collections.abc import Iterable, Iterator

from firstlight.pipeline.data.images import BadImage, ImageHeader, read_header
from firstlight.pipeline.data.sources import Source, SourcePart


def iterate_headers(source: Source, starts: Iterable[int], count: int) -> Iterator[ImageHeader]:
    """Yields the headers of `count` training images in a row from each of `starts` on, in the order of the source.

    Images that cannot be read are left out: `prepare` names them.
    """
    total = source.splits.get("train", 0)
    for start in starts:
        for record in source.read(SourcePart("train", start, min(count, total - start))):
            try:
                if record.data is not None:
                    yield read_header(record.data)
            except BadImage:
                continue
