"""Columns by the names that people give them: Path, filename, image_path; label, class, category; split, subset."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from firstlight.pipeline.data.sources.conventions.reading import fold_name

PATH_COLUMNS = {
    *("path", "paths", "file", "files", "filename", "filenames", "filepath", "filepaths", "image", "images", "img"),
    *("imagepath", "imgpath", "imagefile", "imagename", "imgname", "imagefilename", "relativepath", "relpath"),
    *("uri", "url", "imageurl"),
}
LABEL_COLUMNS = {
    *("label", "labels", "class", "classname", "classlabel", "category", "categoryname", "target", "labelname", "y"),
}
SPLIT_COLUMNS = {
    *("split", "splits", "datasplit", "subset", "set", "partition", "part", "fold", "phase", "usage", "mode"),
}
IMAGE_COLUMNS = {*("image", "images", "img", "jpg", "jpeg", "png", "webp", "bytes", "imagebytes", "picture", "photo")}
# The defaults of dataset.path_column, label_column and image_column
DEFAULT_COLUMNS = ("path", "label", "image")


class FoundColumn(NamedTuple):
    """A column, and a line that says so if it has another name than the one that was looked for."""

    name: str
    note: str = ""


def plain_name(name: str) -> str:
    """Returns the name of a column without case, spaces, signs and the mark of a comment."""
    return "".join(c for c in fold_name(name) if c.isalnum())


def find_column(
    wanted: str,
    names: Sequence[str],
    key: str,
    usual: set[str],
    is_usable: Callable[[str], bool] = lambda name: True,
) -> FoundColumn | None:
    """Returns the column that is called `wanted`, or differs from it in case and signs only.

    Where `wanted` is the default of its key, which nobody has asked for, the only usable column with a `usual` name is
    taken. `key`: the key that settles it, for the note.
    """
    if names.count(wanted) == 1:
        return FoundColumn(wanted)
    near = [name for name in names if plain_name(name) == plain_name(wanted)]
    if not near and wanted in DEFAULT_COLUMNS:
        near = [name for name in names if plain_name(name) in usual and is_usable(name)]
    if len(near) != 1 or names.count(near[0]) != 1:
        return None
    return FoundColumn(near[0], f"{key}: there is no {wanted!r}, {near[0]!r} is taken")
