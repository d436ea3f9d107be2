"""Names of archives as the library `webdataset` has them: braces with ranges and lists, `::` between several."""

import fnmatch
import posixpath
import re
from collections.abc import Iterator, Sequence

from firstlight.pipeline.data.sources.files import Files
from firstlight.pipeline.data.sources.source import SourceOptions, open_root
from firstlight.pipeline.data.sources.tar_index import ARCHIVE_SUFFIXES
from firstlight.pipeline.errors import UserError

MAX_ARCHIVES = 1_000_000
SEPARATOR = "::"
INNER_BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", re.ASCII)
LETTER_RANGE = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])")


def expand_archive_names(root: str) -> list[str]:
    """Returns the names that a root stands for; `a-{08..10}.tar::b.tar` stands for a-08.tar, a-09.tar, a-10.tar, b.tar.

    Raises:
        UserError: a range is empty, or there are more than `MAX_ARCHIVES` names; or a command is to be run.
    """
    names: list[str] = []
    for part in root.split(SEPARATOR):
        if part.startswith("pipe:"):
            raise UserError("dataset.root: 'pipe:' would run a command, which is not done; valid: files and URIs")
        for name in expand_braces(part):
            names.append(name)
            if len(names) > MAX_ARCHIVES:
                raise UserError(f"dataset.root: stands for more than {MAX_ARCHIVES:,} archives")
    return names


def expand_braces(pattern: str) -> Iterator[str]:
    """Yields the names that the braces of a pattern stand for; braces of one name are part of the name.

    Raises:
        UserError: a range is empty or too long.
    """
    for found in INNER_BRACES.finditer(pattern):
        items = found[1].split(",")
        if len(items) == 1 and not NUMBER_RANGE.fullmatch(items[0]) and not LETTER_RANGE.fullmatch(items[0]):
            continue
        for item in items:
            for name in _expand_item(item, found[0]):
                yield from expand_braces(f"{pattern[: found.start()]}{name}{pattern[found.end() :]}")
        return
    yield pattern


def _expand_item(item: str, braces: str) -> Iterator[str]:
    if letters := LETTER_RANGE.fullmatch(item):
        yield from (chr(k) for k in range(ord(letters[1]), ord(letters[2]) + 1))
    elif numbers := NUMBER_RANGE.fullmatch(item):
        low, high, step = int(numbers[1]), int(numbers[2]), int(numbers[3] or 1)
        if not 0 <= high - low < MAX_ARCHIVES or step == 0:
            raise UserError(
                f"dataset.root: {braces!r} is no range of 1 to {MAX_ARCHIVES} archives; valid: e.g. {{000..009}}"
            )
        yield from (f"{k:0{len(numbers[1])}d}" for k in range(low, high + 1, step))
    else:
        yield item


def find_archives(dataset: SourceOptions) -> tuple[Files, list[str]]:
    """Returns the folder of the archives and their names below it: all in it, or those that the root names.

    Raises:
        UserError: no archive is found.
    """
    root = str(dataset.root)
    expanded = expand_archive_names(root)
    is_named = SEPARATOR in root or "*" in root or len(expanded) > 1 or root.lower().endswith(ARCHIVE_SUFFIXES)
    if not is_named:
        files = open_root(root.rstrip("/"), dataset.source)
        names = [name for name in files.list_names() if name.lower().endswith(ARCHIVE_SUFFIXES)]
        names = names or [name for name in files.list_tree() if name.lower().endswith(ARCHIVE_SUFFIXES)]
        return files, _require_names(names, f"*{', *'.join(ARCHIVE_SUFFIXES)}", files)
    tops = [name.rpartition("/")[0] or ("/" if name.startswith("/") else ".") for name in expanded]
    top = tops[0] if len(set(tops)) == 1 else _find_common_folder(tops)
    files = open_root(top, dataset.source)
    patterns = [name if top == "." else name.removeprefix(top).lstrip("/") for name in expanded]
    if not any(sign in pattern for pattern in patterns for sign in "*?["):
        return files, patterns
    known = files.list_names() if not any("/" in pattern for pattern in patterns) else files.list_tree()
    names = [name for name in known if name.lower().endswith(ARCHIVE_SUFFIXES)]
    names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return files, _require_names(names, posixpath.basename(root), files)


def _find_common_folder(folders: Sequence[str]) -> str:
    """Returns the deepest folder above several, of paths or of URIs.

    Raises:
        UserError: there is none.
    """
    parts = [folder.split("/") for folder in folders]
    depth = 0
    while all(len(part) > depth for part in parts) and len({part[depth] for part in parts}) == 1:
        depth += 1
    common = "/".join(parts[0][:depth])
    if depth == 0 or common.endswith((":", ":/")):
        raise UserError(f"dataset.root: {folders[0]!r} and {folders[-1]!r} have no folder in common")
    return common or "/"


def _require_names(names: list[str], what: str, files: Files) -> list[str]:
    if not names:
        raise UserError(f"dataset.root: no {what} files in {files.get_location()!r}")
    return names
