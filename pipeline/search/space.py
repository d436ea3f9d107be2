"""The schema of a search file: which settings of a recipe are searched, and which scores decide. See conf/search.

A search file is YAML. An override `key=value` on the command line sets the search if the first part of its key is a
field of `Search` (`trials=20`, `scheduler.grace=2`), and the recipe otherwise (`dataset.root=/data`).
"""

import itertools
import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.search.objectives import Objective

DIMENSION_KINDS = ("choice", "grid", "uniform", "loguniform", "randint", "quniform")

# Values of settings, by dotted key.
Values = dict[str, Any]


class Dimension(StrictModel):
    """The values of one setting: exactly one of these keys."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="A list of values, one of which is drawn.")
    grid: tuple[Any, ...] | None = Field(
        None,
        min_length=1,
        description="A list of values, all of which are tried, for `algorithm: grid` only: trials are the combinations "
        "of the values of all settings.",
    )
    uniform: tuple[float, float] | None = Field(
        None, description="[low, high]: a number between them, drawn uniformly."
    )
    loguniform: tuple[float, float] | None = Field(
        None, description="[low, high], both above 0: a number between them whose logarithm is drawn uniformly."
    )
    randint: tuple[int, ...] | None = Field(
        None,
        min_length=2,
        max_length=3,
        description="[low, high] or [low, high, step]: a whole number, both ends included. The step is 1 if left out.",
    )
    quniform: tuple[float, float, float] | None = Field(
        None, description="[low, high, step]: a number between low and high, rounded to a multiple of the step."
    )

    @model_validator(mode="after")
    def _check_values(self) -> "Dimension":
        given = [kind for kind in DIMENSION_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"has {' and '.join(given) or 'none'} of {', '.join(DIMENSION_KINDS)}; valid: exactly one of them"
            )
        if self.listed_values:
            if len({json.dumps(value) for value in self.listed_values}) < len(self.listed_values):
                raise ValueError(f"{given[0]}: {list(self.listed_values)} must not repeat a value")
            return self
        low, high, *step = self.range_bounds
        if not low < high or (self.loguniform and low <= 0) or (step and step[0] <= 0):
            valid = "0 < low < high" if self.loguniform else "low < high" + (", step > 0" if step else "")
            raise ValueError(f"{given[0]}: {list(self.range_bounds)} is not valid; valid: {valid}")
        return self

    @property
    def listed_values(self) -> tuple[Any, ...]:
        """The values that are listed one by one, () for a range."""
        return self.choice or self.grid or ()

    @property
    def range_bounds(self) -> tuple[Any, ...]:
        """Lowest value, highest value and, if there is one, the step; () for listed values."""
        return self.uniform or self.loguniform or self.randint or self.quniform or ()

    @property
    def end_values(self) -> tuple[Any, ...]:
        """Every listed value, or the lowest and the highest value of the range."""
        return self.listed_values or self.range_bounds[:2]


class NoScheduler(StrictModel):
    """No trial is stopped early."""

    name: Literal["none"] = Field(description="The name of the scheduler.")


class Asha(StrictModel):
    """Asynchronous successive halving (Li et al. 2018): after some epochs only the best trials continue to train.

    It counts steps where the length of the training is in steps.
    """

    name: Literal["asha"] = Field(description="The name of the scheduler.")
    measure: str | None = Field(
        None,
        description="The number that trials are compared by: <pretrain stage>.<a number that it logs>. "
        "null: the first objective, which must be such a number.",
    )
    mode: Literal["max", "min"] = Field("max", description="Whether larger or smaller values of `measure` are better.")
    grace: int = Field(1, ge=1, description="The number of epochs (or steps) that every trial trains.")
    reduction: float = Field(
        3.0,
        gt=1.0,
        description="One of this number of trials continues after each decision. The epochs (or steps) between two "
        "decisions grow by the same factor.",
    )


class Pbt(StrictModel):
    """Population-based training (Jaderberg et al. 2017).

    All trials train at the same time. After every `interval` epochs the worst trials continue from the networks of the
    best, with the settings of the best, changed a little. It counts steps where the length of the training is in steps.
    """

    name: Literal["pbt"] = Field(description="The name of the scheduler.")
    measure: str | None = Field(
        None,
        description="The number that trials are compared by: <pretrain stage>.<a number that it logs>. "
        "null: the first objective, which must be such a number.",
    )
    mode: Literal["max", "min"] = Field("max", description="Whether larger or smaller values of `measure` are better.")
    interval: int = Field(ge=1, description="The number of epochs (or steps) between two comparisons of the trials.")
    quantile: float = Field(
        0.25,
        gt=0.0,
        le=0.5,
        description="The fraction of the trials that counts as the worst, and the fraction that counts as the best.",
    )
    resample: float = Field(
        0.25,
        ge=0.0,
        le=1.0,
        description="The probability that a copied setting is drawn from its range again instead of being changed.",
    )
    factors: tuple[float, float] = Field(
        (0.8, 1.2),
        strict=False,
        description="The factors, one of which a copied number is multiplied by. A copied value of a list is replaced "
        "by the one before or after it.",
    )

    @field_validator("factors")
    @classmethod
    def _check_factors(cls, factors: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < factors[0] < 1.0 < factors[1]:
            raise ValueError(f"{list(factors)} is not valid; valid: one between 0 and 1, and one above 1")
        return factors


class Promote(StrictModel):
    """The name and alias that the encoder of the best trial gets in MLflow's registry: models:/<name>@<alias>."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z", description="The name of the registered model.")
    alias: str = Field("best", pattern=r"^[A-Za-z][A-Za-z0-9_-]*\z", description="The alias of the new version.")


class Search(StrictModel):
    """The settings of a recipe that are searched, and the objectives that trials are compared by."""

    # Shorter than a recipe's name: the name of a trial is longer by a hyphen and its number.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,57}\z", description="The name of the search.")
    description: str = Field("", description="A text about the search, for people.")
    recipe: str = Field(
        min_length=1, description="The recipe's file: a path relative to the search file, or else below conf/recipe."
    )
    overrides: dict[str, Any] = Field(
        {}, description="The values that every trial replaces in the recipe, by dotted key: the budget of a trial."
    )
    space: dict[str, Dimension] = Field(
        min_length=1, description="The [values of each searched setting](#values-of-a-setting-space), by dotted key."
    )
    objectives: tuple[Objective, ...] = Field(
        description="The [objectives](#objectives-objectives). The first one decides which trial is best."
    )
    algorithm: Literal["optuna", "random", "grid"] = Field(
        "optuna",
        description="How settings are chosen: by Optuna from earlier trials, at random, or all combinations.",
    )
    scheduler: Annotated[NoScheduler | Asha | Pbt, Field(discriminator="name")] = Field(
        NoScheduler(name="none"),
        description="[What ends bad trials early](#schedulers-scheduler): `none`, `asha` or `pbt`, as a name or a "
        "section.",
    )
    trials: int | None = Field(
        None,
        ge=1,
        description="The number of trials; with `pbt` the size of the population. null: all points of the grid.",
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="The largest number of concurrent trials. null: as many as the machines have resources for.",
    )
    seed: int = Field(0, ge=0, description="The seed of the search. The seeds of the recipe are independent of it.")
    promote: Promote | None = Field(
        None, description="[Where the best encoder is registered](#registration-promote). null: nowhere."
    )
    retrain: bool = Field(
        False,
        description="true: at the end the recipe is run with the best setting, without `overrides`, with all its seeds "
        "and the test split.",
    )

    @field_validator("scheduler", mode="before")
    @classmethod
    def _expand_scheduler_name(cls, scheduler: Any) -> Any:
        return {"name": scheduler} if isinstance(scheduler, str) else scheduler

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if not objectives:
            raise ValueError("must name at least one")
        if len({objective.measure for objective in objectives}) < len(objectives):
            raise ValueError("must not repeat a measure")
        return objectives

    @model_validator(mode="after")
    def _check_algorithm(self) -> "Search":
        for key, dimension in self.space.items():
            if self.algorithm == "grid" and not dimension.listed_values:
                raise ValueError(f"space.{key}: a range has no points for algorithm: grid; valid: grid, choice")
            if self.algorithm != "grid" and dimension.grid:
                raise ValueError(f"space.{key}.grid: needs algorithm: grid, but it is {self.algorithm}; valid: choice")
        if self.algorithm != "grid" and self.trials is None:
            raise ValueError("trials: is missing; only algorithm: grid has a number of its own")
        if self.trials and self.algorithm == "grid" and self.trials > len(self.grid_points()):
            raise ValueError(f"trials: {self.trials} is more than the {len(self.grid_points())} points of the grid")
        return self

    @model_validator(mode="after")
    def _check_population(self) -> "Search":
        if not isinstance(self.scheduler, Pbt):
            return self
        if self.algorithm == "optuna":
            raise ValueError(
                "algorithm: 'optuna' learns from trials that have ended, but with scheduler: pbt all trials start "
                "together; valid: random, grid"
            )
        if self.retrain:
            raise ValueError(
                "retrain: true is not valid with scheduler: pbt: the settings of its best trial have changed during "
                "the training; valid: promote"
            )
        if self.num_trials < 2:
            raise ValueError(f"trials: {self.num_trials} is no population; valid: 2 or more")
        return self

    @property
    def num_trials(self) -> int:
        """The number of trials of the whole search."""
        return self.trials or len(self.grid_points())

    @property
    def scheduler_objective(self) -> tuple[str, str] | None:
        """The measure and the mode that the scheduler decides by, None without a scheduler."""
        if isinstance(self.scheduler, NoScheduler):
            return None
        first = self.objectives[0]
        return (self.scheduler.measure, self.scheduler.mode) if self.scheduler.measure else (first.measure, first.mode)

    def grid_points(self) -> list[Values]:
        """Returns all combinations of the listed values. The values of the last key vary fastest."""
        return [
            dict(zip(self.space, point, strict=True))
            for point in itertools.product(*(d.listed_values for d in self.space.values()))
        ]
