"""Tar archives in the layout of WebDataset: train-000.tar, train-001.tar.gz ... below `dataset.root`, or named by it (.../train-{000..009}.tar)."""

import fnmatch
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.files import Files, Listed, at_once, fingerprint
from firstlight.pipeline.data.sources.labels import CLASSES, class_names, numbered, whole_numbers
from firstlight.pipeline.data.sources.source import Record, Source, by_start, not_read, root_files, with_test
from firstlight.pipeline.data.sources.tar_index import ARCHIVES, BROKEN, Found, contents, opened
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_ARCHIVES = 1_000_000


@dataclass(frozen=True)
class Members:
    """n entries of archives, laid end to end."""

    names: pa.BinaryArray  # (n,)
    spans: np.ndarray  # (n, 2) int64: where the bytes are in the archive, and how many
    labels: pa.StringArray  # (n,)
    reasons: dict[int, str]  # entry -> why it is no image


@dataclass(frozen=True)
class WebDataset(Source):
    """Samples of tar archives. Parts are read by the places that the listing found, a compressed archive up to the last of them."""

    kind = "webdataset"
    files: Files
    archives: tuple[str, ...]
    ends: np.ndarray  # (archives,) entries up to and with each
    members: Members

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        within = np.searchsorted(self.ends, places, side="right")
        for archive in np.unique(within).tolist():
            yield from self._of_archive(self.archives[archive], places[within == archive].tolist())

    def _of_archive(self, archive: str, places: list[int]) -> Iterator[Record]:
        done = 0
        try:
            with opened(self.files, archive) as stream:
                for place in places:
                    data, reason = None, self.members.reasons.get(place)
                    if reason is None:
                        offset, size = self.members.spans[place].tolist()
                        stream.seek(offset)
                        data = stream.read(size)
                        data, reason = (data, None) if len(data) == size else (None, f"{archive} ends before it")
                    yield self._record(archive, place, data, reason)
                    done += 1
        except BROKEN as error:
            lost = f"{archive} cannot be read: {' '.join(str(error).split())}"
            yield from (
                self._record(archive, place, None, self.members.reasons.get(place, lost)) for place in places[done:]
            )

    def _record(self, archive: str, place: int, data: bytes | None, reason: str | None) -> Record:
        name = self.members.names[place].as_py().decode()
        return Record(f"{archive}/{name}" if name else archive, data, int(self.labels[place]), reason)


def open_webdataset(dataset: "Dataset") -> WebDataset:
    files, names = _archives(dataset)
    splits = by_start(names)
    archives = tuple(name for split in splits.values() for name in split)
    facts = tuple(files.facts(name) for name in archives)
    members, ends = _members(files, archives, facts, dataset.label_column)
    first = int(ends[len(splits["train"]) - 1])
    if len(members.reasons) == len(members.names) or first == 0:
        raise UserError(f"dataset.root: {_nothing(members)} in {', '.join(archives[:3])} of {files.where()!r}")
    listed = files.where(CLASSES) if files.exists(CLASSES) else ""
    values = whole_numbers(pa.chunked_array([members.labels]))
    known = class_names(files) if dataset.label_column is not None else ()
    classes, labels = numbered(values, known, lambda place: _row(archives, ends, members, place), listed)
    rows = {"train": np.arange(first), "test": np.arange(first, len(labels))}
    keys = [
        b"%s/%s" % (name.encode("utf-8", "surrogateescape"), path) for name, path in _named(archives, ends, members)
    ]
    rows = with_test({split: places for split, places in rows.items() if len(places)}, keys, labels, dataset)
    facts += tuple(files.facts(name) for name in [CLASSES] * bool(listed))
    aside = not_read({*names} - {*archives}, "as others are named for the splits")
    return WebDataset(classes, fingerprint(facts), labels, rows, files, archives, ends, members, aside=aside)


def _archives(dataset: "Dataset") -> tuple[Files, list[str]]:
    """Where the archives are, and their names: all of a folder, or those that the last part of the root stands for."""
    top, _, last = str(dataset.root).rstrip("/").rpartition("/")
    if not (last.lower().endswith(ARCHIVES) or "*" in last or RANGE.search(last)):
        files = root_files(dataset)
        return files, _some(
            [name for name in files.names() if name.lower().endswith(ARCHIVES)], f"*{', *'.join(ARCHIVES)}", files
        )
    files = root_files(dataset.model_copy(update={"root": top or ("/" if str(dataset.root).startswith("/") else ".")}))
    patterns = _expanded(last)
    if any(sign in last for sign in "*?["):
        there = [name for name in files.names() if name.lower().endswith(ARCHIVES)]
        return files, _some(
            [name for name in there if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)], last, files
        )
    return files, patterns


def _some(names: list[str], what: str, files: Files) -> list[str]:
    if not names:
        raise UserError(f"dataset.root: no {what} files in {files.where()!r}")
    return names


def _expanded(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar."""
    found = RANGE.search(pattern)
    if found is None:
        return [pattern]
    low, high = int(found[1]), int(found[2])
    if not 0 <= high - low < MAX_ARCHIVES:
        raise UserError(
            f"dataset.root: {found[0]!r} is no range of 1 to {MAX_ARCHIVES} archives; valid: e.g. {{000..009}}"
        )
    rests = _expanded(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{k:0{len(found[1])}d}{rest}" for k in range(low, high + 1) for rest in rests]


@functools.lru_cache(maxsize=1)  # a run lists its source twice: for its checks, and to prepare it
def _members(
    files: Files, archives: tuple[str, ...], facts: tuple[Listed, ...], label_column: str | None
) -> tuple[Members, np.ndarray]:
    """Also the entries (archives,) up to and with each; `facts`: of the archives, as they were listed."""
    parts = list(at_once(lambda name: _packed(contents(files, name, label_column)), archives))
    ends = np.cumsum([len(part.names) for part in parts])
    firsts = [0, *ends.tolist()]
    reasons = {
        first + place: reason
        for first, part in zip(firsts, parts, strict=False)
        for place, reason in part.reasons.items()
    }
    names, labels = (pa.concat_arrays([getattr(part, key) for part in parts]) for key in ("names", "labels"))
    return Members(names, np.concatenate([part.spans for part in parts]), labels, reasons), ends


def _packed(found: list[Found]) -> Members:
    spans = np.array([(entry.offset, entry.size) for entry in found], np.int64).reshape(-1, 2)
    reasons = {place: entry.reason for place, entry in enumerate(found) if entry.reason is not None}
    return Members(
        pa.array([entry.member.encode() for entry in found], pa.binary()),
        spans,
        pa.array([e.label for e in found], pa.string()),
        reasons,
    )


def _nothing(members: Members) -> str:
    return f"no images, but e.g. {next(iter(members.reasons.values()))!r}" if members.reasons else "no images"


def _row(archives: tuple[str, ...], ends: np.ndarray, members: Members, place: int) -> str:
    return f"{archives[int(np.searchsorted(ends, place, side='right'))]}/{members.names[place].as_py().decode()}"


def _named(archives: tuple[str, ...], ends: np.ndarray, members: Members) -> Iterator[tuple[str, bytes]]:
    for archive, start, end in zip(archives, [0, *ends.tolist()], ends.tolist(), strict=False):
        yield from ((archive, name) for name in members.names[start:end].to_pylist())
