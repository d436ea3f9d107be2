"""The words of the code: names of the field, sentences with a subject and a verb, one name for one thing."""

import ast
import functools
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

SOURCES = sorted(
    file for folder in ("pipeline", "tasks", "bench", "firstlight") for file in (ROOT / folder).rglob("*.py")
)
# A docstring that begins with one of these describes a value by its genitive, and has no subject or verb.
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
    ),
}
# Words of which nobody knows what they hold. `told` is a note, `album` a figure log, `passage` a segment.
PRIVATE_WORDS = {"told", "album", "passage", "handover", "complaints", "doomed", "hasty", "patient", "census"}
# Files that still have one. Only ever removed from.
WITH_PRIVATE_WORDS: set[str] = set()
# Names that several files may have: entry points, and the Python API, which gives names of the packages.
SHARED_NAMES = {"main", "__all__", "load_encoder", "load_recipe", "open_embeddings", "open_index"}
# The largest share of functions and methods whose name is one word.
MAX_ONE_WORD = 0.3


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Words:
    """The words of a file that several tests look at."""

    # Line and text of the docstrings.
    docstrings: tuple[tuple[int, str], ...]
    functions: tuple[str, ...]
    names: Set[str]


@functools.cache
def read_words(file: Path) -> Words:
    docstrings, functions, names = [], [], set[str]()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            docstrings.append((getattr(node, "lineno", 1), text))
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
    return Words(tuple(docstrings), tuple(functions), names)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    docstrings = [(name_of(file), line, text) for file in SOURCES for line, text in read_words(file).docstrings]
    assert docstrings
    firsts = [(file, line, text.split(maxsplit=1)[0].strip(",.;:")) for file, line, text in docstrings]
    assert not [f"{file}:{line}: {first}" for file, line, first in firsts if first in RIDDLES]


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
