"""A page that needs nothing but itself: titled sections of text, tables and pictures as one HTML file, readable on a phone and on paper.

All text is untrusted (names of classes, descriptions, errors) and escaped by Jinja; a page runs no script. Pictures are inside it, scaled down
together where they would make it larger than `LARGEST`.
"""

import base64
import io
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

LARGEST = 12_000_000  # bytes of all pictures, as they are before they become text, which adds a third
SMALLEST = 0.4  # what pictures are scaled to, at most: below that, those of folds are left out
TEMPLATE = "page.html"

Tone = Literal["", "good", "bad", "unsure"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its text: judged, or with a remark below it."""

    text: str
    tone: Tone = ""
    remark: str = ""


@dataclass(frozen=True)
class Text:
    text: str
    style: Literal["plain", "quiet", "code"] = "plain"
    kind: str = "text"


@dataclass(frozen=True)
class Notes:
    """Lines that should not be overlooked."""

    lines: Sequence[str]
    style: Literal["note", "error"] = "note"
    kind: str = "notes"


@dataclass(frozen=True)
class Table:
    """`numbers`: the columns that are set flush right. The first column names its row."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numbers: Sequence[int] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Picture:
    """`alt`: what it shows, for those who do not see it."""

    file: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Pictures: wide ones across the page, others side by side."""

    pictures: Sequence[Picture]
    kind: str = "gallery"


@dataclass(frozen=True)
class Bars:
    """Shares of wholes: by row its name, what stands behind the bar, and (part, share of 0..1) in order. `parts`: all there are, in their order."""

    caption: str
    parts: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]
    kind: str = "bars"


@dataclass(frozen=True)
class Tree:
    """What came from what: a name, a remark, and what came from it."""

    name: str
    remark: str = ""
    below: Sequence["Tree"] = ()
    kind: str = "tree"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when they are asked for."""

    title: str
    blocks: Sequence["Block"]
    kind: str = "fold"


@dataclass(frozen=True)
class Group:
    """Blocks under a heading of their own."""

    title: str
    blocks: Sequence["Block"]
    kind: str = "group"


Block = Text | Notes | Table | Facts | Gallery | Bars | Tree | Fold | Group


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """`kicker`: what kind of page it is; `status`: a word or two on how it ended; `lead`: what it is about."""

    title: str
    kicker: str
    lead: str
    sections: Sequence[Section]
    status: str = ""
    tone: Tone = ""
    foot: str = ""


@dataclass(frozen=True)
class _Embedded:
    uri: str
    width: int
    height: int


def render(page: Page, largest: int = LARGEST) -> str:
    """The page as HTML. Sections without blocks are left out."""
    page_sections = [section for section in page.sections if section.blocks]
    scale, folded = _scale([block for section in page_sections for block in _pictures(section.blocks)], largest)
    remark = (
        f"Pictures are scaled to {scale:.0%} to keep this page small; in MLflow they have their full size."
        if scale < 1
        else ""
    )
    if not folded:
        remark += " Those that were folded away are in MLflow only."
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["embed"] = lambda picture, inside: _embed(picture.file, scale) if folded or not inside else None
    return environment.get_template(TEMPLATE).render(page=page, sections=page_sections, remark=remark)


def _pictures(blocks: Iterable[Block], inside: bool = False) -> Iterator[tuple[Path, bool]]:
    """The files of all pictures, and whether they are inside a fold."""
    for block in blocks:
        if isinstance(block, Gallery):
            yield from ((picture.file, inside) for picture in block.pictures)
        elif isinstance(block, Fold | Group):
            yield from _pictures(block.blocks, inside or isinstance(block, Fold))


def _scale(files: Sequence[tuple[Path, bool]], largest: int) -> tuple[float, bool]:
    """What the sides of pictures are multiplied by, and whether those inside folds are kept."""
    total = sum(file.stat().st_size for file, _ in files)
    scale = min(1.0, math.sqrt(largest / max(total, 1)))
    if scale >= SMALLEST:
        return scale, True
    unfolded = sum(file.stat().st_size for file, inside in files if not inside)
    return max(min(1.0, math.sqrt(largest / max(unfolded, 1))), SMALLEST / 2), False


def _embed(file: Path, scale: float) -> _Embedded:
    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if scale < 1:
            out = io.BytesIO()
            small = image.convert("RGB").resize(
                (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
            )
            small.save(out, "PNG", optimize=True)
            data = min(data, out.getvalue(), key=len)
    return _Embedded(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)


def public(text: str) -> str:
    """Without the names and passwords that addresses may carry: the page is made to be handed on."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
