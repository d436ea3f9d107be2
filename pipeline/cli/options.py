"""Arguments, options and help texts that several commands share."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from firstlight.pipeline.tracking.location import TrackingLocation

LOCATION_HELP = (
    "A recipe, or storage=, tracking.uri= and tracking.experiment=, say where runs are kept. Without them it is ./runs."
)
RUN_HELP = (
    "RUN is the id of a run or its first characters, models:/name@alias, or the name of a recipe, which means its "
    "newest run."
)


def read_location(words: Sequence[str]) -> "TrackingLocation":
    """Returns where the runs are that a command is about.

    Raises:
        UserError: as `parse_location`.
    """
    # MLflow's settings are imported when a command needs them.
    from firstlight.pipeline.tracking.location import parse_location

    return parse_location(words)


def _set_verbose(context: click.Context, parameter: click.Parameter, verbose: bool) -> None:
    """Sets the variable that this process and its workers read."""
    if verbose:
        os.environ["FIRSTLIGHT_VERBOSE"] = "1"


RECIPE_ARGUMENT = click.argument("recipe", type=click.Path(path_type=Path))
OVERRIDES_ARGUMENT = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
RUN_ARGUMENT = click.argument("run", metavar="RUN")
LOCATION_ARGUMENT = click.argument("location", nargs=-1, metavar="[RECIPE.YAML] [KEY=VALUE]...")
ORIGIN_OPTION = click.option(
    *("--from", "origin"),
    multiple=True,
    metavar="LOCATION",
    help="The place where the run is kept, as `firstlight show` takes it, for example storage=/old/runs.",
)
SMOKE_OPTION = click.option(
    "--smoke", is_flag=True, help="Run a trial of about a minute: the settings in the recipe's section `smoke` apply."
)
VERBOSE_OPTION = click.option(
    *("-v", "--verbose"),
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Show the logs of Ray, and the traceback of a failure.",
)
# The options of a first run, whose recipe is written: `starter/first_run.py` has their meaning.
FIRST_RUN_OPTIONS = (
    click.option(
        "--data", type=click.Path(path_type=Path), help="Instead of a recipe: a folder or a list of your own images."
    ),
    click.option(
        "--out", type=click.Path(path_type=Path), help="With --data: the folder of the recipe and all results."
    ),
    click.option("--model", help="With --data: the network, an encoder of Firstlight or a name of timm's."),
    click.option(
        "--weights",
        help="With --data: weights to go on from, as encoder.weights; or the --out of an earlier run. Those of others "
        "need --model.",
    ),
    click.option("--method", help="With --data: the objective of the pretraining, for example simclr."),
    click.option("--epochs", type=click.IntRange(min=1), help="With --data: the length of the pretraining."),
    click.option(
        "--minutes",
        type=click.FloatRange(min=0.0, min_open=True),
        help="With --data: the length of the pretraining in minutes, of all seeds; its rate is measured first.",
    ),
)


def add_first_run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a first run to a command, in their order."""
    for option in reversed(FIRST_RUN_OPTIONS):
        command = option(command)
    return command
