"""Arguments, options and help texts that several commands share."""

import os
from pathlib import Path

import click

LOCATION_HELP = (
    "A recipe, or storage=, tracking.uri= and tracking.experiment=, say where runs are kept. Without them it is ./runs."
)
RUN_HELP = (
    "RUN is the id of a run or its first characters, models:/name@alias, or the name of a recipe, which means its "
    "newest run."
)


def _set_verbose(context: click.Context, parameter: click.Parameter, verbose: bool) -> None:
    """Sets the variable that this process and its workers read."""
    if verbose:
        os.environ["FIRSTLIGHT_VERBOSE"] = "1"


RECIPE_ARGUMENT = click.argument("recipe", type=click.Path(path_type=Path))
OVERRIDES_ARGUMENT = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
RUN_ARGUMENT = click.argument("run", metavar="RUN")
LOCATION_ARGUMENT = click.argument("location", nargs=-1, metavar="[RECIPE.YAML] [KEY=VALUE]...")
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
