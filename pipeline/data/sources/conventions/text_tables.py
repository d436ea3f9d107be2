"""Tables as text: the encoding, the character between the columns, the header and an index column, found from the text.

`csv.Sniffer` and charset-normalizer find what they can; `dataset.delimiter` and `dataset.encoding` settle the rest.
"""

import codecs
import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import charset_normalizer
import pyarrow as pa
from pyarrow import csv as arrow_csv

from firstlight.pipeline.data.sources.conventions.image_signatures import IMAGE_SUFFIXES, find_ending
from firstlight.pipeline.data.sources.conventions.reading import count_things, show_name

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Encodings that are never guessed, as their marks and zero bytes are looked at first
WIDE_ENCODINGS = ("utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_7")
FOREIGN_CONTROL_CHARACTER = re.compile("[\x80-\x9f]")
# Tried before all others, as most text that is not Unicode has it
COMMON_ENCODING = "cp1252"
DELIMITERS = ",;\t|"
DELIMITER_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "|", " ": "space"}
SAMPLED_CHARACTERS, SAMPLED_ROWS = 1 << 16, 50
# Excel writes this line first
SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
# Returns True for a row that has the names of the columns that are looked for
HeaderTest = Callable[[Sequence[str]], bool]
FOREIGN_WORD = re.compile(rb"[A-Za-z]*[\x80-\xff][A-Za-z\x80-\xff]*")
FOREIGN_TEXT = re.compile(r"[^\W\d_]*[^\x00-\x7f][^\W_]*")


class DecodedText(NamedTuple):
    """Text, its encoding, and a note if the encoding was guessed."""

    text: str
    encoding: str
    note: str = ""


class TextDialect(NamedTuple):
    """The character between the columns of a text, the quotes around a cell, and whether a space follows."""

    delimiter: str
    quote: str = '"'
    skips_space: bool = False

    def read_rows(self, text: str, most: int | None = None) -> list[list[str]]:
        """Returns the first `most` rows that are not empty."""
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self.delimiter,
            quotechar=self.quote,
            skipinitialspace=self.skips_space,
        )
        rows: list[list[str]] = []
        for row in reader:
            rows += [row] if row else []
            if most is not None and len(rows) == most:
                break
        return rows


@dataclass
class TextTable:
    """The columns of a text, all of them text, and notes on how it was read."""

    table: pa.Table
    has_header: bool
    encoding: str
    reading: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def decode_text(data: bytes, encoding: str | None) -> DecodedText:
    """Decodes text: UTF-8, or UTF-16 and UTF-32 with or without a mark, else in the encoding that it looks like.

    Raises:
        ValueError: it is not in `encoding`, or in none that can be found.
    """
    if encoding is not None:
        return DecodedText(data.decode(encoding).removeprefix("\ufeff"), encoding)
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return DecodedText(data.decode(name), name)
    head = data[:1024]
    if head.count(0) > len(head) // 4:
        name = "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
        return DecodedText(data.decode(name), name, f"encoding {name}, as every other byte is 0")
    try:
        return DecodedText(data.decode(), "utf-8")
    except UnicodeDecodeError:
        return _decode_guessed(data)


def _decode_guessed(data: bytes) -> DecodedText:
    words = b"\n".join(dict.fromkeys(FOREIGN_WORD.findall(data)))[:SAMPLED_CHARACTERS]
    common = charset_normalizer.from_bytes(words, cp_isolation=[COMMON_ENCODING]).best()
    lines = b"\n".join(line for line in data.splitlines() if not line.isascii())[:SAMPLED_CHARACTERS]
    best = common or charset_normalizer.from_bytes(lines, cp_exclusion=list(WIDE_ENCODINGS)).best()
    for name in dict.fromkeys((best.encoding if best else COMMON_ENCODING, COMMON_ENCODING, "latin-1")):
        try:
            text = data.decode(name)
        except (UnicodeDecodeError, LookupError):
            continue
        # Every text can be read as latin-1, one of another encoding with control characters
        if FOREIGN_CONTROL_CHARACTER.search(text):
            continue
        examples = map(show_name, list(dict.fromkeys(FOREIGN_TEXT.findall(text[:SAMPLED_CHARACTERS])))[:3])
        seen = f"encoding {name}, guessed, as the text is not UTF-8: {', '.join(examples)}"
        return DecodedText(text, name, f"{seen}; dataset.encoding settles it")
    raise ValueError("is in no encoding that can be found; valid: dataset.encoding, e.g. cp1252")


def find_dialect(text: str, default: str, delimiter: str | None, is_header: HeaderTest) -> TextDialect:
    """Finds the character between the columns, and quotes, from the first lines.

    `default`: the delimiter of the file's ending. A delimiter by which the first row is a header counts, whatever the
    sniffer says.
    """
    sample = text[:SAMPLED_CHARACTERS]
    sample = sample if len(text) == len(sample) else sample.rpartition("\n")[0] or sample
    try:
        sniffed = csv.Sniffer().sniff(sample, delimiters=delimiter or DELIMITERS)
        found = TextDialect(sniffed.delimiter, sniffed.quotechar or '"', bool(sniffed.skipinitialspace))
    except csv.Error:
        found = TextDialect(delimiter or default)
    if delimiter is not None:
        return found._replace(delimiter=delimiter)
    others = [TextDialect(one) for one in (default, *DELIMITERS)]
    candidates = [one for one in (found, *others) if is_header((one.read_rows(sample, 1) or [[]])[0])]
    best = candidates[0] if candidates else found
    # A space after the delimiter belongs to the format only if it is there every time
    cells = [cell for row in best._replace(skips_space=False).read_rows(sample, SAMPLED_ROWS) for cell in row[1:]]
    return best._replace(skips_space=bool(cells) and all(cell.startswith(" ") or not cell for cell in cells))


def read_text_table(
    data: bytes,
    default: str,
    encoding: str | None,
    delimiter: str | None,
    is_header: HeaderTest,
) -> TextTable:
    """Reads a table. The columns of a table without a header are called 0, 1, ...

    Raises:
        ValueError: the text cannot be decoded.
        pyarrow.ArrowInvalid: a row has another number of columns.
    """
    decoded = decode_text(data, encoding)
    text, notes = decoded.text, [decoded.note] if decoded.note else []
    if separator := SEPARATOR_LINE.match(text):
        delimiter, text = delimiter or separator[1], text[separator.end() :]
    text, num_comments = _skip_comments(text, lambda part: find_dialect(part, default, delimiter, is_header), is_header)
    if num_comments:
        notes.append(f"{count_things(num_comments, 'line')} before the header left out, beginning with #")
    dialect = find_dialect(text, default, delimiter, is_header)
    rows = dialect.read_rows(text, SAMPLED_ROWS)
    widths = {len(row) for row in rows[1:]}
    has_header = bool(rows) and not (not is_header(rows[0]) and any(map(_is_image_path, rows[0])))
    names = None
    if not has_header and rows:
        names = [str(k) for k in range(len(rows[0]))]
        first = ", ".join(map(show_name, rows[0][:5]))
        notes.append(f"no header: the first row is {first}; columns are called 0, 1, ...")
    elif rows and widths == {len(rows[0]) + 1}:
        notes.append("the first column has no name: taken as an index")
        names = ["", *rows[0]]
    reading = []
    name = DELIMITER_NAMES.get(dialect.delimiter, dialect.delimiter)
    name += " and space" if dialect.skips_space else ""
    if (dialect.delimiter, decoded.encoding) != (default, "utf-8") or dialect.skips_space:
        reading.append(f"columns are separated by {name}, encoding {decoded.encoding}")
    if dialect.skips_space or dialect.quote != '"' or len(dialect.delimiter.encode()) > 1:
        text, dialect = _rewrite_plainly(text, dialect), TextDialect(",")
    skip = int(names is not None and has_header)
    table = _parse_plain(text.encode("utf-8", "surrogatepass"), dialect.delimiter, names, skip)
    return TextTable(table, has_header, decoded.encoding, reading, notes)


def _skip_comments(text: str, find: Callable[[str], TextDialect], is_header: HeaderTest) -> tuple[str, int]:
    """Returns the text from its header on, if only lines with # stand before it, and the number of these."""
    rest, count = text, 0
    while rest.startswith("#") and "\n" in rest:
        rest, count = rest.partition("\n")[2], count + 1

    def has_header(part: str) -> bool:
        return is_header((find(part).read_rows(part[:SAMPLED_CHARACTERS], 1) or [[]])[0])

    return (rest, count) if count and not has_header(text) and has_header(rest) else (text, 0)


def _is_image_path(cell: str) -> bool:
    return find_ending(cell.strip()) in IMAGE_SUFFIXES


def _rewrite_plainly(text: str, dialect: TextDialect) -> str:
    """Returns the table with commas and double quotes, without spaces after commas."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(dialect.read_rows(text))
    return out.getvalue()


def _parse_plain(data: bytes, delimiter: str, names: Sequence[str] | None, skip: int) -> pa.Table:
    # pyarrow names a wrong row only without threads
    options = arrow_csv.ReadOptions(use_threads=False, column_names=names, skip_rows=skip if names else 0)
    layout = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    if names is None:
        names = arrow_csv.open_csv(pa.BufferReader(data), read_options=options, parse_options=layout).schema.names
    kinds = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )
    return arrow_csv.read_csv(pa.BufferReader(data), read_options=options, parse_options=layout, convert_options=kinds)
