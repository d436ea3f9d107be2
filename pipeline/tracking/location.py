"""Where runs are kept: the storage and the MLflow that a recipe names, or `storage=...` and `tracking.uri=...` on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.errors import UserError, suggest_valid

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe

KEYS = ("storage", "tracking.uri", "tracking.experiment")


@dataclass(frozen=True)
class Records:
    """A storage folder, and the experiment of the MLflow beside it or elsewhere."""

    storage: Path
    uri: str
    experiment: str

    @classmethod
    def of(cls, recipe: "Recipe") -> "Records":
        return _records(recipe.storage, recipe.tracking.uri, recipe.tracking.experiment)

    @property
    def database(self) -> Path | None:
        """The file of an SQLite database; None: a server."""
        path = self.uri.removeprefix("sqlite:///")
        return None if path == self.uri else Path(path)

    @property
    def local(self) -> bool:
        """Whether a server can be started on it here."""
        return not self.uri.startswith(("http://", "https://"))

    @property
    def words(self) -> tuple[str, ...]:
        """What says the same on a command line; () where it is what is meant without a word."""
        default = _records(Path("runs"), None, "firstlight")
        told = {"storage": str(self.storage), "tracking.uri": self.uri, "tracking.experiment": self.experiment}
        usual = {
            "storage": str(default.storage),
            "tracking.uri": _records(self.storage, None, "").uri,
            "tracking.experiment": default.experiment,
        }
        return tuple(f"{key}={value}" for key, value in told.items() if value != usual[key])


def _records(storage: Path, uri: str | None, experiment: str) -> Records:
    storage = storage.resolve()
    return Records(storage, uri or f"sqlite:///{storage / 'mlflow.db'}", experiment)


def named(words: Sequence[str]) -> Records:
    """Where the words of a command line say that runs are kept: a recipe, whose keys count, and key=value, which count before it.

    Raises:
        UserError: a recipe that is not there; a key that is none of `KEYS`; a value that is no text.
    """
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise UserError(
            f"{' '.join(recipes)}: one recipe at most says where runs are kept; or give {', '.join(f'{key}=' for key in KEYS)}"
        )
    told: dict[str, Any] = _told_by(Path(recipes[0])) if recipes else {}
    for word in words:
        key, sign, value = word.partition("=")
        if sign and key not in KEYS:
            raise UserError(f"{key}: is no key of where runs are kept; {suggest_valid(key, KEYS)}")
        if sign:
            told[key] = yaml_reader.parse_yaml(value, where=key)
    for key, value in told.items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{key}: {value!r} is not valid; valid: a text")
    return _records(
        Path(told.get("storage", "runs")), told.get("tracking.uri"), told.get("tracking.experiment", "firstlight")
    )


def _told_by(recipe: Path) -> dict[str, Any]:
    raw = yaml_reader.read_yaml(recipe)
    tracking = raw.get("tracking")
    flat = {"storage": raw.get("storage")} | {
        f"tracking.{key}": value for key, value in (tracking if isinstance(tracking, dict) else {}).items()
    }
    return {key: value for key, value in flat.items() if key in KEYS and value is not None}
