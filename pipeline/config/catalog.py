"""The recipes that ship with Firstlight, as `firstlight recipes` lists them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from firstlight.pipeline import ROOT
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.messages import explain
from firstlight.pipeline.config.recipe import Expected, Needs, Strict
from firstlight.pipeline.errors import UserError

FOLDER = ROOT / "conf" / "recipe"


class _Told(Strict):
    """The sections of a recipe that are listed."""

    needs: Needs | None = None
    expected: tuple[Expected, ...] = ()


@dataclass(frozen=True)
class Listed:
    """`name`: the recipe's path below conf/recipe, without its ending."""

    name: str
    needs: Needs | None
    expected: tuple[Expected, ...]

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, data, GPUs, hours, and the first of the paper's numbers."""
        data, gpus, hours = (
            ("", "", "") if self.needs is None else (self.needs.data, str(self.needs.gpus), f"{self.needs.hours:g}")
        )
        return self.name, data, gpus, hours, self._headline()

    def _headline(self) -> str:
        if not self.expected:
            return ""
        first = self.expected[0]
        others = f", and {len(self.expected) - 1} more" if len(self.expected) > 1 else ""
        return f"{first.measure} {first.paper:g} ({first.source}){others}"


def listed(folder: Path = FOLDER) -> list[Listed]:
    """What the files say, without their data sets being there.

    Raises:
        UserError: a file is no recipe; names it.
    """
    return [
        _listed(file, file.relative_to(folder).with_suffix("").as_posix())
        for file in sorted(folder.rglob("*.yaml"), key=_by_folder)
    ]


def _by_folder(file: Path) -> tuple[int, Path]:
    return len(file.parts), file


def _listed(file: Path, name: str) -> Listed:
    raw = yaml_reader.read(file)
    told = {key: raw[key] for key in _Told.model_fields if key in raw}
    try:
        found = _Told.model_validate_json(json.dumps(told))
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, told, _Told)}") from None
    return Listed(name, found.needs, found.expected)


HEADINGS = ("recipe", "data", "GPUs", "hours", "the paper's number")


def listing(found: Sequence[Listed]) -> Table:
    """For a terminal."""
    out = Table(title="conf/recipe/<recipe>.yaml; hours are estimates", title_justify="left")
    for heading in HEADINGS:
        out.add_column(
            heading, justify="right" if heading in ("GPUs", "hours") else "left", no_wrap=heading == "recipe"
        )
    for recipe in found:
        out.add_row(*recipe.cells())
    return out


def plain(found: Sequence[Listed]) -> str:
    """A line of tab-separated cells for each recipe."""
    return "\n".join("\t".join(row) for row in (HEADINGS, *(recipe.cells() for recipe in found)))
