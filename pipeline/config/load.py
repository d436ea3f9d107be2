"""Loads recipes: YAML files and `key=value` overrides become one frozen, typed `Recipe`."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.conf_files import find_conf_file, find_conf_folder
from firstlight.pipeline.config.messages import explain_errors, explain_invalid_values
from firstlight.pipeline.config.recipe import Recipe, recipe_model
from firstlight.pipeline.config.stages import STAGE_SECTIONS
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.tasks.extensions.registry import find_entry_points

# Sections of a recipe, and of a stage, that start from conf/<group>/<name>.yaml.
CONF_GROUPS = ("dataset", "scale")
STAGE_CONF_GROUPS = ("method", "task")
# The keys that the section `smoke` of every recipe starts from.
SMOKE_DEFAULTS: dict[str, Any] = {
    "seeds": [0],
    "storage": "runs",
    "scale": {"name": "local", "workers": 0},
}


def load_recipe(path: Path, overrides: tuple[str, ...] = (), smoke: bool = False) -> Recipe:
    """Reads, composes and checks a recipe.

    `path`: the file of a recipe, or the name of a shipped one, for example `nat/table3`. `overrides`: texts `key=value`
    with dotted keys. `smoke`: the recipe's trial run is loaded, which has a name of its own.

    Raises:
        UserError: one line for each mistake, which names the dotted key, the value and the valid values.
    """
    return RecipeFiles(path).build_recipe(overrides, smoke)


class RecipeFiles:
    """The file of a recipe and the files of `conf` that it starts from. Each file is read once.

    All recipes that one object builds have the same contents, also if somebody edits the files in the meantime.
    """

    def __init__(self, path: Path) -> None:
        self.path = find_conf_file(path, "recipe")
        self.conf = find_conf_folder(self.path)
        self._contents: dict[Path, dict[str, Any]] = {}
        self._groups: dict[str, dict[str, Path]] = {}
        if {"recipe", "space"} <= self.read_file(self.path).keys():
            raise UserError(f"{path}: is a search of settings, not a recipe: firstlight search {path}")

    def read_file(self, file: Path) -> dict[str, Any]:
        """Returns a copy of the content of a file, as the file was when it was read first.

        Raises:
            UserError: the file cannot be read or is no YAML mapping.
        """
        if file not in self._contents:
            self._contents[file] = yaml_reader.read_yaml(file)
        return copy.deepcopy(self._contents[file])

    def list_group(self, group: str) -> dict[str, Path]:
        """Returns the files of a group of `conf` by their names, for example those of conf/method."""
        if group not in self._groups:
            self._groups[group] = {file.stem: file for file in sorted((self.conf / group).glob("*.yaml"))}
        return self._groups[group]

    def build_recipe(
        self, overrides: tuple[str, ...] = (), smoke: bool = False, values: Mapping[str, Any] | None = None
    ) -> Recipe:
        """Composes and checks the recipe. `values`: values by dotted key, which overrides replace.

        Raises:
            UserError: as `load_recipe`.
        """
        raw = self.read_file(self.path)
        raw = _apply_smoke(raw) if smoke else raw
        for key, value in (values or {}).items():
            _set_key(raw, key.split("."), copy.deepcopy(value))
        apply_overrides(raw, overrides)
        return parse_recipe(_compose_recipe(raw, self))


def apply_overrides(raw: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Sets the keys of overrides `key=value` in a mapping, in place.

    Raises:
        UserError: the recipe has no such stage, or a part of the key is a value and not a section.
    """
    for text in overrides:
        _set_key(raw, *split_override(text))


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Checks a composed mapping, which no longer refers to files of `conf`.

    Raises:
        UserError: as `load_recipe`.
    """
    model = recipe_model()
    if mistakes := list(explain_invalid_values(raw)):
        raise UserError("\n".join(mistakes))
    try:
        # A copy: the mappings of a frozen recipe can still be changed.
        return _validate_recipe(json.dumps(raw), model).model_copy(deep=True)
    except ValidationError as error:
        raise UserError(explain_errors(error, raw, model)) from None


@lru_cache(maxsize=256)
def _validate_recipe(text: str, model: type[Recipe]) -> Recipe:
    """Recipes are frozen: the same text gives the same object, and each process validates it once."""
    return model.model_validate_json(text)


def hash_json(value: Any) -> str:
    """Returns the hexadecimal SHA-256 of a JSON value in canonical form: equal values have equal hashes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _apply_smoke(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe in which the section `smoke`, of dotted or nested keys, replaces keys.

    The recipe, and the models that it registers and refers to, get names of their own: a trial run must not replace
    what a full run has registered.
    """
    changes = raw.get("smoke")
    if not isinstance(changes, dict):
        raise UserError(
            f"smoke: {'is no section' if 'smoke' in raw else 'is missing'}; it holds the keys that a trial run changes"
        )
    raw = {**raw, "name": f"{raw.get('name')}-smoke"}
    for dotted, value in {**SMOKE_DEFAULTS, **changes}.items():
        raw = merge_sections(raw, reduce(lambda inner, key: {key: inner}, reversed(dotted.split(".")), value))
    sections = (raw[group] for group in ("stages", "defaults") if isinstance(raw.get(group), dict))
    for stage in (stage for section in sections for stage in section.values() if isinstance(stage, dict)):
        if isinstance(stage.get("register_as"), str):
            stage["register_as"] += "-smoke"
        if isinstance(stage.get("encoder"), str):
            stage["encoder"] = re.sub(r"^models:/([^/@]+)", r"models:/\1-smoke", stage["encoder"])
    return raw


def split_override(override: str) -> tuple[list[str], Any]:
    """Returns the parts of the dotted key, and the value, of an override `key=value`.

    Raises:
        UserError: the text has another form, or the value is not YAML.
    """
    key, sign, value = override.partition("=")
    if not sign or not key or not all(key.split(".")):
        raise UserError(f"{override!r}: an override must be key=value, e.g. scale.workers=2")
    return key.split("."), yaml_reader.parse_yaml(value, where=key)


def _set_key(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    stages = raw.get("stages")
    if keys[0] == "stages" and len(keys) > 1 and isinstance(stages, dict) and keys[1] not in stages:
        _check_new_stage(stages, keys, value)
    for depth, key in enumerate(keys[:-1], 1):
        if raw.get(key) is None:
            raw[key] = {}
        elif isinstance(raw[key], str) and key in (*CONF_GROUPS, *STAGE_CONF_GROUPS):
            raw[key] = {"name": raw[key]}
        raw = raw[key]
        if not isinstance(raw, dict):
            raise UserError(
                f"{'.'.join(keys[:depth])}: is the value {raw!r}, not a section, so {'.'.join(keys)!r} cannot be set"
            )
    raw[keys[-1]] = value


def _check_new_stage(stages: dict[str, Any], keys: list[str], value: Any) -> None:
    """Checks an override of a stage that the recipe does not have: a whole section, such as `evaluate={}`, adds it."""
    name = keys[1]
    kind = value.get("kind", name) if isinstance(value, dict) else name
    if len(keys) == 2 and isinstance(value, dict) and kind in STAGE_SECTIONS:
        return
    known = ", ".join(STAGE_SECTIONS)
    added = f"stages.{name}={{}} adds it" if name in STAGE_SECTIONS else f"stages.{name}={{kind: ...}} adds it: {known}"
    raise UserError(f"stages.{name}: no such stage in this recipe; {suggest_valid(name, stages)}; {added}")


def _compose_recipe(raw: dict[str, Any], files: RecipeFiles) -> dict[str, Any]:
    defaults = raw.get("defaults", {})
    if not isinstance(defaults, dict) or not all(isinstance(section, dict) for section in defaults.values()):
        raise UserError("defaults: must contain one section for each kind of stage, e.g. defaults.finetune")
    for kind in defaults:
        if kind not in STAGE_SECTIONS:
            raise UserError(f"defaults.{kind}: no such kind of stage; {suggest_valid(kind, STAGE_SECTIONS)}")
    out = {
        key: _merge_group_file(files, key, value, key) if key in CONF_GROUPS else value
        for key, value in raw.items()
        if key not in ("defaults", "smoke")
    }
    stages = out.get("stages")
    if isinstance(stages, dict):
        out["stages"] = {name: _compose_stage(files, name, stage, defaults) for name, stage in stages.items()}
    return out


def _compose_stage(files: RecipeFiles, name: str, stage: Any, defaults: dict[str, dict[str, Any]]) -> Any:
    stage = {} if stage is None else stage
    if not isinstance(stage, dict):
        return stage
    stage = {"kind": name, **stage}
    stage = merge_sections(defaults.get(str(stage["kind"]), {}), stage)
    groups = {
        key: _merge_group_file(files, key, stage[key], f"stages.{name}.{key}")
        for key in STAGE_CONF_GROUPS
        if key in stage
    }
    return {**stage, **groups}


def _merge_group_file(files: RecipeFiles, group: str, value: Any, where: str) -> Any:
    """Returns the section conf/<group>/<name>.yaml with the keys of `value` replaced. A string means its name."""
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return value
    known = files.list_group(group)
    if value["name"] not in known:
        # A data set that has its source is one of the user's own, and is complete.
        if group == "dataset" and "source" in value:
            return value
        # Other packages bring no files of `conf`: their defaults are those of their classes.
        added = [point.name for point in find_entry_points(f"{group}s")] if group in STAGE_CONF_GROUPS else []
        if value["name"] in added:
            return value
        valid = suggest_valid(value["name"], [*known, *added])
        raise UserError(f"{where}.name: {value['name']!r} is unknown; {valid}")
    base = files.read_file(known[value["name"]])
    # The name in the file counts: it may be another one, as instance.yaml is a setting of super_and.
    return merge_sections(base, {**value, "name": base["name"]})


def merge_sections(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with the keys of `over` replaced, section by section.

    A section whose `name` differs, for example another optimiser, replaces the whole section of `base`.
    """
    if "name" in over and over["name"] != base.get("name", over["name"]):
        return over
    both = {
        key: merge_sections(base[key], over[key])
        for key in base.keys() & over.keys()
        if isinstance(base[key], dict) and isinstance(over[key], dict)
    }
    return {**base, **over, **both}
