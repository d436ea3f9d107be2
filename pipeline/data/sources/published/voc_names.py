"""The names of images in the lists of a set in VOC's layout, which people write in several ways.

VOC's lists have the name of the file without its ending. Lists with endings, with whole paths, also of another machine,
and with an image and its annotation on a line are read, too, where they name a file that exists.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from firstlight.pipeline.data.sources.published.image_lists import list_image_files
from firstlight.pipeline.errors import UserError

VOC_IMAGES = "JPEGImages"
# The value of a class in a list of its occurrence.
OCCURRENCE_END = re.compile(r"\s+(-1|0|1)\Z")
PLAIN_NAME, ENDS_OF_PATHS = "as VOC has them", "by the ends of their paths"


class ImageNames:
    """The images in JPEGImages by name, and how the names in lists were read."""

    def __init__(self, root: Path) -> None:
        found = list_image_files(root, VOC_IMAGES)
        # Name -> its path below the root.
        self.paths = {_drop_ending(path)[len(VOC_IMAGES) + 1 :]: path for path in found}
        self._files = {path[len(VOC_IMAGES) + 1 :] for path in found}
        # File of the list -> how its names were read -> their number.
        self.seen: dict[Path, Counter[str]] = {}

    def find_name(self, line: str, file: Path | None = None) -> str | None:
        """Returns the name of the image that a line of a list names, None if there is no such file.

        The way in which it was found is counted for `file`.
        """
        for name, how in self._list_candidates(line):
            if name in self.paths:
                if file is not None:
                    self.seen.setdefault(file, Counter())[how] += 1
                return name
        return None

    def is_one_name(self, text: str) -> bool:
        """Returns True unless a text is several words, and no file is called so."""
        return len(text.split()) < 2 or text in self.paths or text in self._files

    def _list_candidates(self, line: str) -> Iterator[tuple[str, str]]:
        """Yields the names that a line can mean, the most literal first, and how they were found."""
        plain = OCCURRENCE_END.sub("", line)
        yield line, PLAIN_NAME
        yield plain, PLAIN_NAME
        for text, how in ((plain, ""), (line.split()[0], "by the first word of a line")):
            path = text.replace("\\", "/")
            below, last = path.rpartition(f"{VOC_IMAGES}/")[2], PurePosixPath(path).name
            for name in (path, below, last):
                if name in self._files:
                    yield _drop_ending(name), how or ("without their endings" if name == text else ENDS_OF_PATHS)
                yield name, how or (PLAIN_NAME if name == text else ENDS_OF_PATHS)

    def describe_names(self) -> list[str]:
        """Returns a note for each list whose names are not VOC's."""
        return [
            f"{file.name}: {sum(found.values()):,} names were found "
            + ", ".join(f"{how} ({count:,})" for how, count in sorted(found.items()))
            for file, found in self.seen.items()
            if set(found) != {PLAIN_NAME}
        ]

    def check_found(self, file: Path, lines: int) -> None:
        """Checks that a list names at least one image that exists.

        Raises:
            UserError: it names `lines` images, and none exists.
        """
        if lines and self.paths and file not in self.seen:
            raise UserError(
                f"{file}: none of its {lines} names is an image in {VOC_IMAGES}, which holds e.g. "
                f"{sorted(self._files)[0]!r}; valid: a name a line, without its ending"
            )


def _drop_ending(path: str) -> str:
    return path.rpartition(".")[0]
