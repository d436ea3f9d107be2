"""A search file -> one frozen, typed `Search` over the settings of a recipe, and the recipe of every trial. See conf/search.

A search file is YAML. What is given on the command line as `key=value` is the search's own where the first part of the key is one of its
fields (`trials=20`, `scheduler.grace=2`), and the recipe's otherwise (`dataset.root=/data`).
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from firstlight.pipeline import ROOT
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.messages import explain
from firstlight.pipeline.config.recipe import Downstream, Pretrain, Recipe, Strict, digest, load, parse, split_override
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.search.objectives import Objective

RECIPES = ROOT / "conf" / "recipe"
KINDS = ("choice", "grid", "uniform", "loguniform", "randint", "quniform")

Values = dict[str, Any]  # dotted key -> value


class Dimension(Strict):
    """The values of one setting: exactly one of these keys."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    grid: tuple[Any, ...] | None = Field(None, min_length=1)  # algorithm: grid tries each with each
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, ...] | None = Field(
        None, min_length=2, max_length=3
    )  # both ends are drawn; the third number is the step, else 1
    quniform: tuple[float, float, float] | None = None  # the third number is the step

    @model_validator(mode="after")
    def _checked(self) -> "Dimension":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"has {' and '.join(given) or 'none'} of {', '.join(KINDS)}; valid: exactly one of them")
        if self.listed:
            if len({json.dumps(value) for value in self.listed}) < len(self.listed):
                raise ValueError(f"{given[0]}: {list(self.listed)} must not repeat a value")
            return self
        low, high, *step = self.bounds
        if not low < high or (self.loguniform and low <= 0) or (step and step[0] <= 0):
            valid = "0 < low < high" if self.loguniform else "low < high" + (", step > 0" if step else "")
            raise ValueError(f"{given[0]}: {list(self.bounds)} is not valid; valid: {valid}")
        return self

    @property
    def listed(self) -> tuple[Any, ...]:
        return self.choice or self.grid or ()

    @property
    def bounds(self) -> tuple[Any, ...]:
        return self.uniform or self.loguniform or self.randint or self.quniform or ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """All listed values, or the lowest and the highest."""
        return self.listed or self.bounds[:2]


class NoScheduler(Strict):
    name: Literal["none"]


class Asha(Strict):
    """Asynchronous successive halving (Li et al. 2018): of the trials that have come so far, only the best train on."""

    name: Literal["asha"]
    measure: str | None = None  # <pretrain stage>.<a number that it logs>; null: the first objective, which must be one
    mode: Literal["max", "min"] = "max"
    grace: int = Field(1, ge=1)  # epochs that every trial may train
    reduction: float = Field(
        3.0, gt=1.0
    )  # one of so many trains on; also the factor between the epochs of two decisions


class Pbt(Strict):
    """Population-based training (Jaderberg et al. 2017): the trials train together, and after every `interval` epochs the worst of them go on from
    the networks of the best, with settings that are those of the best, changed a little."""

    name: Literal["pbt"]
    measure: str | None = None  # as of asha
    mode: Literal["max", "min"] = "max"
    interval: int = Field(ge=1)  # epochs
    quantile: float = Field(0.25, gt=0.0, le=0.5)  # the share of trials that are the worst, and the best
    resample: float = Field(
        0.25, ge=0.0, le=1.0
    )  # with this probability a setting is drawn anew instead of changed a little
    factors: tuple[float, float] = Field(
        (0.8, 1.2), strict=False
    )  # what a number is multiplied by, one of them; of listed values it is the one before or after

    @field_validator("factors")
    @classmethod
    def _around_one(cls, factors: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < factors[0] < 1.0 < factors[1]:
            raise ValueError(f"{list(factors)} is not valid; valid: one between 0 and 1, and one above 1")
        return factors


class Promote(Strict):
    """The name and alias that the encoder of the best trial gets in MLflow's registry: models:/<name>@<alias>."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    alias: str = Field("best", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")


class Search(Strict):
    """Which settings of a recipe are searched, and by what they are judged."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,57}$")  # a trial's name is three digits longer
    description: str = ""
    recipe: str = Field(min_length=1)  # below conf/recipe, or beside the search file
    overrides: dict[str, Any] = Field({})  # by dotted key: the budget of a trial
    space: dict[str, Dimension] = Field(min_length=1)  # by dotted key
    objectives: tuple[Objective, ...]  # the first decides which trial is best
    algorithm: Literal["optuna", "random", "grid"] = "optuna"
    scheduler: Annotated[NoScheduler | Asha | Pbt, Field(discriminator="name")] = NoScheduler(name="none")
    trials: int | None = Field(None, ge=1)  # null: all points of a grid. Of pbt: the population
    concurrency: int | None = Field(
        None, ge=1
    )  # trials at a time, at most; null: as many as fit the machine or cluster
    seed: int = Field(0, ge=0)  # of the search; a recipe's seeds are its own
    promote: Promote | None = None
    retrain: bool = False  # the recipe without `overrides`, with all its seeds and the test split, with the best setting, at the end

    @field_validator("scheduler", mode="before")
    @classmethod
    def _named(cls, scheduler: Any) -> Any:
        return {"name": scheduler} if isinstance(scheduler, str) else scheduler

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if not objectives:
            raise ValueError("must name at least one")
        if len({objective.measure for objective in objectives}) < len(objectives):
            raise ValueError("must not repeat a measure")
        return objectives

    @model_validator(mode="after")
    def _algorithm(self) -> "Search":
        for key, dimension in self.space.items():
            if self.algorithm == "grid" and not dimension.listed:
                raise ValueError(f"space.{key}: a range has no points for algorithm: grid; valid: grid, choice")
            if self.algorithm != "grid" and dimension.grid:
                raise ValueError(f"space.{key}.grid: needs algorithm: grid, and it is {self.algorithm}; valid: choice")
        if self.algorithm != "grid" and self.trials is None:
            raise ValueError("trials: is missing; only algorithm: grid has a number of its own")
        if self.trials and self.algorithm == "grid" and self.trials > len(self.points()):
            raise ValueError(f"trials: {self.trials} is more than the {len(self.points())} points of the grid")
        return self

    @model_validator(mode="after")
    def _population(self) -> "Search":
        if not isinstance(self.scheduler, Pbt):
            return self
        if self.algorithm == "optuna":
            raise ValueError(
                "algorithm: 'optuna' learns from trials that have ended, and those of scheduler: pbt begin together; valid: random, grid"
            )
        if self.retrain:
            raise ValueError(
                "retrain: true is not valid with scheduler: pbt: the settings of its best trial have changed on the way; valid: promote"
            )
        if self.total < 2:
            raise ValueError(f"trials: {self.total} is no population; valid: 2 or more")
        return self

    @property
    def total(self) -> int:
        """Trials."""
        return self.trials or len(self.points())

    @property
    def deciding(self) -> tuple[str, str] | None:
        """What a scheduler decides by: measure and mode."""
        if isinstance(self.scheduler, NoScheduler):
            return None
        first = self.objectives[0]
        return (self.scheduler.measure, self.scheduler.mode) if self.scheduler.measure else (first.measure, first.mode)

    def points(self) -> list[Values]:
        """Of a grid: each value with each, the last key the fastest."""
        return [
            dict(zip(self.space, point, strict=True))
            for point in itertools.product(*(d.listed for d in self.space.values()))
        ]


@dataclass(frozen=True)
class Plan:
    """A checked search, and what its trials are made of."""

    search: Search
    file: Path  # of the recipe
    overrides: tuple[str, ...]  # of the recipe, from the command line

    def whole(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with these values, as it is run at the end.

        Raises:
            UserError: as `config.load`.
        """
        return load(self.file, self.overrides, values=values)

    def base(self, values: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe with the budget of a trial."""
        return load(self.file, self.overrides, values={**self.search.overrides, **(values or {})})

    def trial(self, values: Mapping[str, Any], references: Mapping[str, str] | None = None) -> Recipe:
        """The recipe of a trial: the stages that its objectives rest on, on held-out data only. `references`: of encoders, pinned, by stage."""
        recipe = self.base(values)
        raw = recipe.dump()
        for name, reference in (references or {}).items():
            raw["stages"][name]["encoder"] = reference
        stages = {name: {**raw["stages"][name], **_unregistered(recipe, name)} for name in self.stages(recipe)}
        return parse({**raw, "stages": stages, "score_test": False, "expected": [], "needs": None})

    def stages(self, recipe: Recipe) -> list[str]:
        """Those that the objectives and the scheduler read, and the pretrainings before them whose encoder they take, in order."""
        deciding = [self.search.deciding[0]] if self.search.deciding else []
        wanted = {measure.partition(".")[0] for measure in [*(o.measure for o in self.search.objectives), *deciding]}
        names = list(recipe.stages)
        for name in list(wanted):
            stage = recipe.stages[name]
            if isinstance(stage, Downstream) and stage.takes_encoder and stage.encoder == "previous":
                wanted.add(next(n for n in reversed(names[: names.index(name)]) if recipe.stages[n].kind == "pretrain"))
        return [name for name in names if name in wanted]

    def maker(self, recipe: Recipe) -> str | None:
        """The pretraining whose encoder the first objective judges; None where it is of another run."""
        first = self.search.objectives[0].measure.partition(".")[0]
        names = self.stages(recipe)
        before = [name for name in names[: names.index(first) + 1] if recipe.stages[name].kind == "pretrain"]
        stage = recipe.stages[first]
        mine = not isinstance(stage, Downstream) or (stage.takes_encoder and stage.encoder == "previous")
        return before[-1] if before and mine else None

    def corners(self) -> list[Values]:
        """A setting in the middle of things, and from there each end of each dimension: every mistake of the space shows at one of them."""
        start = {key: dimension.ends[0] for key, dimension in self.search.space.items()}
        found = [
            start,
            *({**start, key: end} for key, dimension in self.search.space.items() for end in dimension.ends),
        ]
        return list({json.dumps(values, sort_keys=True): values for values in found}.values())

    def told(self, message: str, values: Mapping[str, Any]) -> str:
        """A recipe's complaint with these values, as one about the space."""
        given = ", ".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
        return "\n".join(
            f"space.{line}" if self._searches(line.partition(":")[0]) else f"space: with {given}: {line}"
            for line in message.splitlines()
        )

    def _searches(self, named: str) -> bool:
        """Whether a key is searched, or part of one that is, or has such a part."""
        return any(f"{key}.".startswith(f"{named}.") or f"{named}.".startswith(f"{key}.") for key in self.search.space)

    def fingerprint(self) -> str:
        """Of all that decides what the trials are: a search that is changed in it is another one."""
        counted = (
            set() if isinstance(self.search.scheduler, Pbt) else {"trials"}
        )  # a trial more changes nothing of the others, but in a population
        search = self.search.model_dump(
            mode="json", exclude={"name", "description", "concurrency", "promote", "retrain", "recipe"} | counted
        )
        recipe = self.base().model_dump(
            mode="json", exclude={"name", "description", "storage", "tracking", "scale", "expected", "needs"}
        )
        recipe["dataset"] = {
            key: value for key, value in recipe["dataset"].items() if key not in ("root", "download", "extends")
        }
        return digest({"search": search, "recipe": recipe})[:12]


def _unregistered(recipe: Recipe, name: str) -> dict[str, None]:
    return {"register_as": None} if isinstance(recipe.stages[name], Pretrain) else {}


def read(path: Path, overrides: tuple[str, ...] = ()) -> Plan:
    """Read a search file; `space_check.read` also checks it against its recipe.

    Raises:
        UserError: one line per mistake, each naming the dotted key, the value and what would be valid.
    """
    raw = yaml_reader.read(path)
    own = [override for override in overrides if override.partition("=")[0].split(".")[0] in Search.model_fields]
    for keys, value in map(split_override, own):
        raw = _laid_over(raw, keys, value)
    try:
        search = Search.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise UserError(explain(error, raw, Search)) from None
    others = tuple(override for override in overrides if override not in own)
    return Plan(search, _recipe_file(path, search.recipe), others)


def _laid_over(raw: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """What follows the name of a section is one key of it, also in `space` and `overrides`, where it has dots."""
    section = raw.get(keys[0])
    section = {"name": section} if keys[0] == "scheduler" and isinstance(section, str) else section
    if len(keys) > 1:
        value = {**(section if isinstance(section, dict) else {}), ".".join(keys[1:]): value}
    return {**raw, keys[0]: value}


def _recipe_file(path: Path, name: str) -> Path:
    confs = [parent / "recipe" / name for parent in path.resolve().parents if parent.name == "conf"]
    places = (*confs, RECIPES / name, path.resolve().parent / name)
    for place in places:
        if place.is_file():
            return place
    known = {file.relative_to(RECIPES).as_posix() for file in RECIPES.rglob("*.yaml")}
    raise UserError(f"recipe: {name!r} is neither below conf/recipe nor beside {path}; {suggest_valid(name, known)}")
