"""The commands of kinds of stages, read from the source of their sections: an import of these takes a second."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firstlight.pipeline.config.stages import StageConfig

SECTIONS_FOLDER = Path(__file__).parents[1] / "stages" / "sections"


def list_command_helps() -> dict[str, str]:
    """Returns the help of the command of each kind of stage, the `command_help` of its section."""
    known = sys.modules.get("firstlight.pipeline.config.stages")
    # Kinds of other packages are known to a process that has imported them.
    registered: dict[str, type[StageConfig]] = known.STAGE_SECTIONS if known is not None else {}
    return _read_own_helps() | {
        kind: one.command_help or f"Run the stages of kind {kind}." for kind, one in registered.items()
    }


# Cached, as the help of all commands asks for each of them.
@functools.cache
def _read_own_helps() -> dict[str, str]:
    return dict(found for file in sorted(SECTIONS_FOLDER.glob("*.py")) for found in _read_helps(file))


def _read_helps(file: Path) -> Iterator[tuple[str, str]]:
    """Yields the kind and the help of each section in a source file.

    They are in the lines `kind: Literal["embed"]` and `command_help: ClassVar[str] = "..."`.
    """
    for section in ast.parse(file.read_text("utf-8")).body:
        fields = section.body if isinstance(section, ast.ClassDef) else []
        named = {ast.unparse(field.target): field for field in fields if isinstance(field, ast.AnnAssign)}
        kind, text = named.get("kind"), named.get("command_help")
        if kind is not None and isinstance(kind.annotation, ast.Subscript) and text is not None and text.value:
            yield ast.literal_eval(kind.annotation.slice), ast.literal_eval(text.value)
