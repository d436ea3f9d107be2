"""The catalogue of the recipes that ship with Firstlight, which `firstlight recipes` lists."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from firstlight.pipeline import ROOT
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.messages import explain_errors
from firstlight.pipeline.config.schemas.paper_results import ExpectedResult, ResourceEstimate
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.terminal import Column, build_table, format_tsv

RECIPES_FOLDER = ROOT / "conf" / "recipe"


class _CatalogSections(StrictModel):
    """The sections of a recipe that the catalogue reads."""

    needs: ResourceEstimate | None = None
    expected: tuple[ExpectedResult, ...] = ()


@dataclass(frozen=True)
class CatalogEntry:
    """A recipe of the catalogue."""

    # The recipe's path below conf/recipe, without its suffix.
    name: str
    needs: ResourceEstimate | None
    expected: tuple[ExpectedResult, ...]

    def format_cells(self) -> tuple[str, str, str, str, str]:
        """Returns the name, data, GPUs, hours, and the first of the paper's numbers."""
        resources = ("", "", "")
        if self.needs is not None:
            resources = self.needs.data, str(self.needs.gpus), f"{self.needs.hours:g}"
        return (self.name, *resources, self._format_first_result())

    def _format_first_result(self) -> str:
        if not self.expected:
            return ""
        first = self.expected[0]
        others = f", and {len(self.expected) - 1} more" if len(self.expected) > 1 else ""
        return f"{first.measure} {first.paper:g} ({first.source}){others}"


def list_recipes(folder: Path = RECIPES_FOLDER) -> list[CatalogEntry]:
    """Returns the recipes below `folder`, those of the folder itself first. Their data sets need not exist.

    Raises:
        UserError: a file is not a recipe; the message names the file.
    """
    return [
        _read_entry(file, file.relative_to(folder).with_suffix("").as_posix())
        for file in sorted(folder.rglob("*.yaml"), key=_folder_depth)
    ]


def _folder_depth(file: Path) -> tuple[int, Path]:
    return len(file.parts), file


def _read_entry(file: Path, name: str) -> CatalogEntry:
    raw = yaml_reader.read_yaml(file)
    sections = {key: raw[key] for key in _CatalogSections.model_fields if key in raw}
    try:
        found = _CatalogSections.model_validate_json(json.dumps(sections))
    except ValidationError as error:
        raise UserError(f"{file}: {explain_errors(error, sections, _CatalogSections)}") from None
    return CatalogEntry(name, found.needs, found.expected)


CATALOG_COLUMNS = (
    Column("recipe", fixed=True),
    Column("data"),
    Column("GPUs", numeric=True),
    Column("hours", numeric=True),
    Column("the paper's number"),
)


def build_catalog_table(found: Sequence[CatalogEntry]) -> Table:
    """Returns the catalogue as a table for the terminal."""
    rows = [recipe.format_cells() for recipe in found]
    return build_table(CATALOG_COLUMNS, rows, "conf/recipe/<recipe>.yaml; hours are estimates", grid=True)


def format_catalog_tsv(found: Sequence[CatalogEntry]) -> str:
    """Returns a line of tab-separated cells for each recipe, after a line of headings."""
    return format_tsv([[column.heading for column in CATALOG_COLUMNS], *(recipe.format_cells() for recipe in found)])
