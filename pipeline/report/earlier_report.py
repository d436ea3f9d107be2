"""Reports of other settings under the same name: the differences are listed, and the earlier report is kept."""

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.page_parts import RECIPE_FILE, REPORT_FILE

MAX_LISTED_CHANGES = 5
# Keys that change neither what a run computes nor what its report is about.
IGNORED_SECTIONS = ("needs", "smoke", "scale", "tracking", "storage")


def keep_earlier_report(folder: Path, recipe: Recipe) -> list[str]:
    """Renames the report of a run in `folder` whose settings differ from those of `recipe`.

    Returns a note with the settings that differ and the earlier report's new file; [] if there is no such report.
    """
    report, settings = folder / REPORT_FILE, folder / RECIPE_FILE
    if not report.exists() or not settings.exists():
        return []
    try:
        before = yaml_reader.read_yaml(settings)
    except UserError:
        return []
    changes = list(_list_changes(before, recipe.dump()))
    if not changes:
        return []
    written = datetime.datetime.fromtimestamp(report.stat().st_mtime, datetime.UTC)
    kept = report.with_name(f"report-{written:%Y%m%d-%H%M%S}.html")
    report.rename(kept)
    settings.rename(kept.with_suffix(".yaml"))
    more = f" and {len(changes) - MAX_LISTED_CHANGES} more" if len(changes) > MAX_LISTED_CHANGES else ""
    listed = ", ".join(changes[:MAX_LISTED_CHANGES])
    return [f"the last run of {recipe.name} had other settings: {listed}{more}; its report is kept as {kept}"]


def _list_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yields `key: old -> new` for every dotted key whose values differ."""
    for key in dict.fromkeys([*before, *now]):
        if not where and key in IGNORED_SECTIONS:
            continue
        old, new, dotted = before.get(key), now.get(key), f"{where}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _list_changes(old, new, f"{dotted}.")
        elif old != new:
            yield f"{dotted}: {_format_setting(old)} -> {_format_setting(new)}"


def _format_setting(value: Any) -> str:
    if value is None:
        return "none"
    text = "..." if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
