"""The location of runs: a storage folder and an experiment in MLflow, from a recipe or from the command line."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.data.mirror.places import (
    explain_missing_database,
    find_mirror,
    name_location,
    place_storage,
)
from firstlight.pipeline.errors import UserError, suggest_valid

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe

DATABASE_FILE, DEFAULT_EXPERIMENT = "mlflow.db", "firstlight"
LOCATION_KEYS = ("storage", "tracking.uri", "tracking.experiment")
# `sqlite:///` or `sqlite+<driver>:///`, the path of the file, and options.
SQLITE_URI = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]*)(?:\?.*)?\Z", re.DOTALL)


@dataclass(frozen=True)
class TrackingLocation:
    """A storage folder, the URI of MLflow, and the name of an experiment there."""

    storage: Path
    uri: str
    experiment: str

    @classmethod
    def of(cls, recipe: "Recipe") -> "TrackingLocation":
        return _make_location(recipe.storage, recipe.tracking.uri, recipe.tracking.experiment)

    @property
    def database(self) -> Path | None:
        """Returns the file of an SQLite database, None for a server."""
        found = SQLITE_URI.match(self.uri)
        return Path(unquote(found["path"])) if found else None

    @property
    def artifacts(self) -> str:
        """Returns where MLflow keeps the artifacts of an SQLite database, as MLflow takes it."""
        database = self.database
        # A bucket has no part of MLflow's database: the two stay together.
        is_apart = database is not None and find_mirror(self.storage) is not None
        folder = (database.resolve().parent if database and is_apart else self.storage) / "mlartifacts"
        return str(folder) if quote(str(folder)) == str(folder) else folder.as_uri()

    @property
    def is_local(self) -> bool:
        """Returns True if MLflow's user interface can be started here, so `uri` is no server."""
        return not self.uri.startswith(("http://", "https://"))

    @property
    def as_overrides(self) -> tuple[str, ...]:
        """Returns the overrides that give this location on the command line; empty for the default."""
        storage = name_location(self.storage)
        values = {"storage": storage, "tracking.uri": self.uri, "tracking.experiment": self.experiment}
        usual = {
            "storage": str(Path("runs").resolve()),
            "tracking.uri": make_sqlite_uri(self.storage / DATABASE_FILE) if "://" not in storage else None,
            "tracking.experiment": DEFAULT_EXPERIMENT,
        }
        return tuple(f"{key}={_quote_value(value)}" for key, value in values.items() if value != usual[key])


def _quote_value(text: str) -> str:
    """Returns a text as the value of an override, which is YAML: quoted only if YAML would read another value."""
    try:
        is_plain = yaml_reader.parse_yaml(text, where="value") == text
    except UserError:
        is_plain = False
    return text if is_plain else json.dumps(text)


def _make_location(storage: Path, uri: str | None, experiment: str) -> TrackingLocation:
    if uri is None and find_mirror(storage) is not None:
        raise UserError(explain_missing_database(storage))
    storage = storage.resolve()
    return TrackingLocation(storage, uri or make_sqlite_uri(storage / DATABASE_FILE), experiment)


def make_sqlite_uri(file: Path) -> str:
    """Returns the URI of an SQLite database, with the characters quoted that have a meaning in a URI."""
    quoted = quote(str(file))
    # MLflow would create the folders of a quoted `sqlite:///` URI with the quotes in their names.
    return f"sqlite:///{file}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


def parse_location(arguments: Sequence[str]) -> TrackingLocation:
    """Returns the location that the arguments of a command give: a recipe, and key=value, which override its keys.

    Raises:
        UserError: the recipe cannot be read, a key is not in `LOCATION_KEYS`, or a value is not a text.
    """
    recipes = [word for word in arguments if "=" not in word]
    if len(recipes) > 1:
        keys = ", ".join(f"{key}=" for key in LOCATION_KEYS)
        raise UserError(f"{' '.join(recipes)}: several recipes; valid: one recipe, or {keys}")
    values: dict[str, Any] = _read_recipe_keys(Path(recipes[0])) if recipes else {}
    for word in arguments:
        key, sign, value = word.partition("=")
        if sign and key not in LOCATION_KEYS:
            raise UserError(f"{key}: does not say where runs are kept; {suggest_valid(key, LOCATION_KEYS)}")
        if sign:
            values[key] = yaml_reader.parse_yaml(value, where=key)
    for key, value in values.items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{key}: {value!r} is not valid; valid: a text")
    try:
        storage = place_storage(values.get("storage", "runs"))
    except ValueError as error:
        raise UserError(f"storage: {error}") from None
    experiment = values.get("tracking.experiment", DEFAULT_EXPERIMENT)
    return _make_location(storage, values.get("tracking.uri"), experiment)


def _read_recipe_keys(recipe: Path) -> dict[str, Any]:
    raw = yaml_reader.read_yaml(recipe)
    tracking = raw.get("tracking")
    flat = {"storage": raw.get("storage")} | {
        f"tracking.{key}": value for key, value in (tracking if isinstance(tracking, dict) else {}).items()
    }
    return {key: value for key, value in flat.items() if key in LOCATION_KEYS and value is not None}
