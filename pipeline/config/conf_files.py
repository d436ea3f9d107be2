"""The files of `conf`: recipes and searches, by their paths or by the names that `firstlight recipes` lists."""

import difflib
from pathlib import Path
from typing import Literal

from firstlight.pipeline import ROOT
from firstlight.pipeline.errors import UserError

CONF_FOLDER = ROOT / "conf"
# The file that `firstlight init` and its kin start from, and the methods that are recommended.
STARTER_FILE = CONF_FOLDER / "starter.yaml"


def find_conf_folder(recipe: Path) -> Path:
    """Returns the folder `conf` that contains the recipe, or the one of Firstlight if none does."""
    for parent in recipe.resolve().parents:
        if parent.name == "conf":
            return parent
    return CONF_FOLDER


def find_conf_file(path: Path, group: Literal["recipe", "search"]) -> Path:
    """Returns the file of a recipe or a search: `path` if it exists, or else the shipped one of this name.

    A name is the path below conf/<group> without its suffix, for example `nat/table3`.

    Raises:
        UserError: there is neither; names similar names.
    """
    if path.exists() or path.is_absolute():
        return path
    folder = CONF_FOLDER / group
    known = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    name = path.with_suffix("").as_posix() if path.suffix in (".yaml", ".yml") else path.as_posix()
    name = name.removeprefix(f"conf/{group}/")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`firstlight recipes` lists the recipes"
        raise UserError(f"{path}: no such file, and no {group} of Firstlight has this name; {hint}")
    return known[name]
