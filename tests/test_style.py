"""The words of the code: names of the field, sentences with a subject and a verb, one name for one thing."""

import ast
import functools
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCES = sorted(
    file for folder in ("pipeline", "tasks", "bench", "firstlight") for file in (ROOT / folder).rglob("*.py")
)
TEST_SOURCES = sorted((ROOT / "tests").rglob("*.py"))
# A docstring or comment that begins with one of these describes a value by its genitive, and has no subject or verb.
RIDDLES = {
    *(
        "Of",
        "Whether",
        "That",
        "As",
        "Those",
        "By",
        "How",
        "Who",
        "What",
        "Where",
        "When",
        "Without",
        "Behind",
        "Beside",
        "Which",
    ),
}
# The words of these that also begin whole sentences, for example "By default ..." and "Without it, ...".
CLAUSE_WORDS = {"As", "By", "That", "When", "Where", "Without"}
THIRD_PERSON = re.compile(r"[A-Z][a-z-]+s")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n")
# Words of which nobody knows what they hold. `told` is a note, `album` a figure log, `passage` a segment.
PRIVATE_WORDS = {"told", "album", "passage", "handover", "complaints", "doomed", "hasty", "patient", "census"}
# Files that still have one. Only ever removed from.
WITH_PRIVATE_WORDS: set[str] = set()
# Names that several files may have: entry points, and the Python API, which gives names of the packages.
SHARED_NAMES = {"main", "__all__", "load_encoder", "load_recipe", "open_embeddings", "open_index"}
# The largest share of functions and methods whose name is one word.
MAX_ONE_WORD = 0.3
MAX_LINE_LENGTH = 120
# The folders of text files, and their names or endings. Notebooks are left out: they are JSON with printed outputs.
TEXT_FOLDERS = ("pipeline", "tasks", "bench", "firstlight", "conf", "docs", "tests", ".ci")
TEXT_ENDINGS = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".js", ".txt"}
TEXT_NAMES = {"Makefile", "Dockerfile", "run"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Words:
    """The words of a file that several tests look at."""

    # Line and text of the docstrings.
    docstrings: tuple[tuple[int, str], ...]
    # Line and text of the docstrings of functions that are neither properties nor commands, whose text is their help.
    calls: tuple[tuple[int, str], ...]
    # Line and text of the comments above a line; those of adjacent lines are one.
    comments: tuple[tuple[int, str], ...]
    functions: tuple[str, ...]
    names: Set[str]


@functools.cache
def read_words(file: Path) -> Words:
    docstrings, calls, functions, names = [], [], [], set[str]()
    source = file.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            docstrings.append((getattr(node, "lineno", 1), text))
            if isinstance(node, ast.FunctionDef) and not _is_property_or_command(node):
                calls.append((node.lineno, text))
        if isinstance(node, ast.FunctionDef):
            functions.append(node.name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return Words(tuple(docstrings), tuple(calls), tuple(_find_comments(source)), tuple(functions), names)


def _is_property_or_command(function: ast.FunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any(re.search(r"property|\b(command|group)\(", decorator) for decorator in decorators)


def _find_comments(source: str) -> Iterator[tuple[int, str]]:
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    numbers = [token.start[0] for token in tokens if token.type == tokenize.COMMENT]
    own = [number for number in numbers if lines[number - 1].lstrip().startswith("#")]
    for number in own:
        if number - 1 not in own:
            end = next(k for k in range(number, len(lines) + 2) if k not in own)
            yield number, "\n".join(line.strip().lstrip("#").strip() for line in lines[number - 1 : end - 1])


def begin_of(sentence: str) -> str:
    words = sentence.split(maxsplit=1)
    return words[0].strip(",.;:") if words else ""


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    files = [*SOURCES, *TEST_SOURCES]
    docstrings = [(name_of(file), line, text) for file in files for line, text in read_words(file).docstrings]
    assert docstrings
    firsts = [(file, line, begin_of(text)) for file, line, text in docstrings]
    assert not [f"{file}:{line}: {first}" for file, line, first in firsts if first in RIDDLES]


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    docstrings = [(name_of(file), line, text) for file in SOURCES for line, text in read_words(file).calls]
    assert docstrings
    firsts = [(file, line, begin_of(text)) for file, line, text in docstrings]
    assert not [f"{file}:{line}: {first}" for file, line, first in firsts if not THIRD_PERSON.fullmatch(first)]


def test_comments_begin_with_a_subject() -> None:
    files = [*SOURCES, *TEST_SOURCES]
    comments = [(name_of(file), line, text) for file in files for line, text in read_words(file).comments]
    assert comments
    firsts = [(file, line, begin_of(text)) for file, line, text in comments]
    assert not [f"{file}:{line}: {first}" for file, line, first in firsts if first in RIDDLES]


def test_later_sentences_of_docstrings_and_comments_begin_with_a_subject() -> None:
    texts = [
        (name_of(file), line, text)
        for file in [*SOURCES, *TEST_SOURCES]
        for line, text in (*read_words(file).docstrings, *read_words(file).comments)
    ]
    firsts = [
        (file, line, begin_of(sentence)) for file, line, text in texts for sentence in SENTENCE_END.split(text)[1:]
    ]
    assert firsts
    assert not [f"{file}:{line}: {first}" for file, line, first in firsts if first in RIDDLES - CLAUSE_WORDS]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# Of each class.\n# Two lines\nx = 1  # no own line\n# Next", ["Of each class.\nTwo lines", "Next"]),
        ('x = """\n# text\n"""\n', []),
        ("def f():\n    # a\n\n    # b\n    pass\n", ["a", "b"]),
    ],
)
def test_comments_are_found(text: str, found: list[str]) -> None:
    assert [comment for _, comment in _find_comments(text)] == found


def test_public_functions_of_several_statements_have_docstrings() -> None:
    nodes = [(name_of(file), node) for file in SOURCES for node in ast.parse(file.read_text("utf-8")).body]
    assert nodes
    assert not [
        f"{file}:{node.lineno}: {node.name}"
        for file, node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and len(node.body) > 3
        and not ast.get_docstring(node)
    ]


def test_most_functions_have_names_of_several_words() -> None:
    functions = [name for file in SOURCES for name in read_words(file).functions]
    names = [name.strip("_") for name in functions if not name.startswith("__")]
    one_word = [name for name in names if "_" not in name]
    assert len(one_word) <= MAX_ONE_WORD * len(names), f"{len(one_word)} of {len(names)}"


def test_names_are_terms_of_the_field() -> None:
    words = {
        name_of(file): {word for name in read_words(file).names for word in name.lower().split("_")} for file in SOURCES
    }
    assert {file for file, found in words.items() if found & PRIVATE_WORDS} == WITH_PRIVATE_WORDS


def test_top_level_names_stand_in_one_file() -> None:
    files: dict[str, set[str]] = defaultdict(set)
    for file in SOURCES:
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                files[node.name].add(name_of(file))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (part for target in targets for part in ast.walk(target)):
                    if isinstance(name, ast.Name):
                        files[name.id].add(name_of(file))
    shared = {name: sorted(where) for name, where in files.items() if len(where) > 1 and name not in SHARED_NAMES}
    assert not shared


def list_text_files() -> Iterator[Path]:
    """Yields the text files of the project, without those that it ignores, as builds and environments."""
    files = [*ROOT.iterdir(), *(file for folder in TEXT_FOLDERS for file in (ROOT / folder).rglob("*"))]
    for file in sorted(files):
        if (file.suffix in TEXT_ENDINGS or file.name in TEXT_NAMES) and file.is_file():
            yield file


def may_be_long(file: Path, line: str) -> bool:
    """Tells whether a line cannot be broken: a row of a Markdown table, or one word, such as a URL."""
    is_table_row = file.suffix == ".md" and line.lstrip().startswith("|")
    return is_table_row or len(line.split()) == 1


def test_lines_have_at_most_120_characters() -> None:
    files = list(list_text_files())
    names = {name_of(file) for file in files}
    assert {"README.md", "Makefile", ".ci/run", "conf/recipe/quickstart.yaml", "docs/guide.md"} <= names
    assert not [
        f"{name_of(file)}:{number}: {len(line)}"
        for file in files
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if len(line) > MAX_LINE_LENGTH and not may_be_long(file, line)
    ]
