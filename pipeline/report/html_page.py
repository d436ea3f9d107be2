"""A self-contained page: titled sections of text, tables and pictures as one HTML file, for screens, phones and paper.

All text is untrusted (names of classes, descriptions, errors). It is escaped by Jinja, and marks that change the
direction of text are shown as escapes. The one script of a page is `page.js`, which sorts tables and enlarges pictures;
the page's policy names its hash, so that a browser runs no other, and the page is whole without it. Pictures are
embedded in the page, and scaled down together if they have more than MAX_EMBEDDED_BYTES.
"""

import base64
import hashlib
import io
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from firstlight.pipeline.report.first_screen.blocks import GainChart, Headline, NextSteps
from firstlight.pipeline.terminal import escape_text

# The bytes of all pictures together, before they are encoded as text, which adds a third.
MAX_EMBEDDED_BYTES = 12_000_000
# The pictures inside folds are left out if a smaller scale than this would be needed.
MIN_PICTURE_SCALE = 0.4
PAGE_TEMPLATE, PAGE_SCRIPT = "page.html", "page.js"

Tone = Literal["", "good", "bad", "unsure"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table with a tone, which colours it, or a remark below its text."""

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
    """Highlighted lines, such as warnings."""

    lines: Sequence[str]
    style: Literal["note", "error"] = "note"
    kind: str = "notes"


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. `numbers`: the columns that are set flush right."""

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
    """A picture with a caption. `alt`: a description of its content for screen readers."""

    file: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Pictures: wide ones over the width of the page, others side by side."""

    pictures: Sequence[Picture]
    kind: str = "gallery"


@dataclass(frozen=True)
class StripItem:
    """Small images, as the addresses of their data, with a text below them."""

    images: Sequence[str]
    text: str


@dataclass(frozen=True)
class Strip:
    """Small images side by side, in as many lines as they need."""

    items: Sequence[StripItem]
    kind: str = "strip"


@dataclass(frozen=True)
class MapPoint:
    """A point at (x, y) in 0..1 from the top left, of one of the map's classes, with an image and a text of its own."""

    x: float
    y: float
    part: int
    image: str
    text: str


@dataclass(frozen=True)
class PointMap:
    """Points on a plane. One that is pointed at or touched shows its image. `parts`: the names of the classes."""

    caption: str
    parts: Sequence[str]
    points: Sequence[MapPoint]
    kind: str = "map"


@dataclass(frozen=True)
class Bars:
    """Bars of shares. A row has a name, a text after the bar, and its parts with their shares in 0..1.

    `parts`: the names of all parts, in order.
    """

    caption: str
    parts: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]
    kind: str = "bars"


@dataclass(frozen=True)
class Tree:
    """A tree of origins: a name, a remark, and what was made from it."""

    name: str
    remark: str = ""
    below: Sequence["Tree"] = ()
    kind: str = "tree"


@dataclass(frozen=True)
class Fold:
    """Blocks that are hidden until the reader opens them."""

    title: str
    blocks: Sequence["Block"]
    kind: str = "fold"


@dataclass(frozen=True)
class Group:
    """Blocks under a heading."""

    title: str
    blocks: Sequence["Block"]
    kind: str = "group"


Block = (
    Text
    | Notes
    | Table
    | Facts
    | Gallery
    | Strip
    | PointMap
    | Bars
    | Tree
    | Fold
    | Group
    | Headline
    | GainChart
    | NextSteps
)


@dataclass(frozen=True)
class PageSection:
    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A page. `kicker`: the kind of the page; `lead`: its subject; `status`: how the run ended, with its `tone`.

    `opening`: the blocks of the first screen, before the contents.
    """

    title: str
    kicker: str
    lead: str
    sections: Sequence[PageSection]
    status: str = ""
    tone: Tone = ""
    foot: str = ""
    opening: Sequence[Block] = ()


@dataclass(frozen=True)
class _Embedded:
    uri: str
    width: int
    height: int


def render_page(page: Page, largest: int = MAX_EMBEDDED_BYTES) -> str:
    """Returns the page as HTML. Sections without blocks are left out."""
    page_sections = [section for section in page.sections if section.blocks]
    scale, folded = _choose_scale(
        [
            file
            for blocks in (page.opening, *(section.blocks for section in page_sections))
            for file in _list_picture_files(blocks)
        ],
        largest,
    )
    remark = (
        f"Pictures are scaled to {scale:.0%} to keep this page small; in MLflow they have their full size."
        if scale < 1
        else ""
    )
    if not folded:
        remark += " Folded pictures are in MLflow only."
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escape_value,
    )
    environment.globals["embed"] = lambda picture, inside: (
        _embed_picture(picture.file, scale) if folded or not inside else None
    )
    script = (Path(__file__).parent / PAGE_SCRIPT).read_text("utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(PAGE_TEMPLATE).render(
        page=page, sections=page_sections, remark=remark, script=script, script_hash=allowed
    )


def _escape_value(value: Any) -> Any:
    """Returns a value of the template with escapes for characters that a browser would obey and not show."""
    return escape_text(value) if type(value) is str else value


def _list_picture_files(blocks: Iterable[Block], inside: bool = False) -> Iterator[tuple[Path, bool]]:
    """Yields the file of each picture, and True if it is inside a fold."""
    for block in blocks:
        if isinstance(block, Gallery):
            yield from ((picture.file, inside) for picture in block.pictures)
        elif isinstance(block, Fold | Group):
            yield from _list_picture_files(block.blocks, inside or isinstance(block, Fold))


def _choose_scale(files: Sequence[tuple[Path, bool]], largest: int) -> tuple[float, bool]:
    """Returns the factor for the sides of all pictures, and True if the pictures inside folds are kept."""
    total = sum(file.stat().st_size for file, _ in files)
    scale = min(1.0, math.sqrt(largest / max(total, 1)))
    if scale >= MIN_PICTURE_SCALE:
        return scale, True
    unfolded = sum(file.stat().st_size for file, inside in files if not inside)
    return max(min(1.0, math.sqrt(largest / max(unfolded, 1))), MIN_PICTURE_SCALE / 2), False


def _embed_picture(file: Path, scale: float) -> _Embedded:
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


def strip_credentials(text: str) -> str:
    """Returns the text without the user names and passwords of its addresses, because pages are shared."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def format_date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
