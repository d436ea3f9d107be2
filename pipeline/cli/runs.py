"""The commands around runs: what there is, where it came from, and what becomes of it; and those of the machine that they ran on."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.location import named

if TYPE_CHECKING:
    from rich.console import RenderableType

WORDS = click.argument("where", nargs=-1, metavar="[RECIPE.YAML] [KEY=VALUE]...")
RUN = click.argument("run", metavar="RUN")
WHERE = "Where runs are kept is said by a recipe, or by storage=, tracking.uri= and tracking.experiment=; without a word it is ./runs."
WHICH = "RUN is a run's id or its beginning, models:/name@alias, or the name of a recipe: its newest run."


def _command(name: str, *help_text: str) -> Callable[[Callable[..., Any]], click.Command]:
    return click.command(name, help="\n\n".join(help_text))


def _print(shown: "RenderableType") -> None:
    """As wide as a terminal is; in a pipe as wide as it is itself."""
    if sys.stdout.isatty():
        Console().print(shown)
        return
    console = Console(width=1000, highlight=False)
    with console.capture() as capture:
        console.print(shown)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


@_command(
    "runs",
    "List recipes and searches, and below each its stages and trials: state, numbers, and what a recipe can take as `encoder`.",
    WHERE,
)
@WORDS
@click.option("-n", "--name", default="", help="Only those whose name has this in it.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=10, show_default=True, help="How many recipes and searches."
)
def runs(where: tuple[str, ...], name: str, limit: int) -> None:
    from firstlight.pipeline.cli.history import lines, plain, table
    from firstlight.pipeline.tracking.lineage import read

    lineage, _ = read(named(where))
    found = list(lines(lineage, name, limit))
    if sys.stdout.isatty():
        console = Console()
        console.print(table(lineage, found, console.width))
    else:
        click.echo(plain(lineage, found))


@_command("show", "Show where a run came from and what came from it, from the data to the models.", WHICH, WHERE)
@RUN
@WORDS
def show(run: str, where: tuple[str, ...]) -> None:
    from firstlight.pipeline.cli.tree import show as tree
    from firstlight.pipeline.tracking.lineage import read

    lineage, _ = read(named(where))
    _print(tree(lineage, lineage.find(run), time.time()))


@_command(
    "promote",
    "Give the encoder of a pretraining (or of a trial, or a recipe's first seed) a name and an alias.",
    WHICH,
    WHERE,
)
@RUN
@WORDS
@click.option("--name", required=True, help="Its name in MLflow's model registry.")
@click.option("--alias", default="current", show_default=True, help="Leads to this version from now on.")
def promote(run: str, where: tuple[str, ...], name: str, alias: str) -> None:
    from firstlight.pipeline.cli import promote as module
    from firstlight.pipeline.tracking.lineage import read

    lineage, client = read(named(where))
    found = lineage.find(run)
    reference = module.promote(lineage, client, found, name, alias)
    click.echo(
        f"{reference} is now the encoder of {module.encoder_of(lineage, found).name} ({module.encoder_of(lineage, found).short})"
    )


@_command(
    "delete",
    "Delete a run with all that is below it: stages, trials, models, artifacts, and their folders on disk. Stores of images stay. It says what it "
    "would delete, and asks. `firstlight run` makes anew what was deleted.",
    WHICH,
    WHERE,
)
@RUN
@WORDS
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Also where other runs rest on it.")
def delete(run: str, where: tuple[str, ...], yes: bool, force: bool) -> None:
    from firstlight.pipeline.cli import delete as module
    from firstlight.pipeline.tracking.lineage import read

    lineage, client = read(named(where))
    found = module.doomed(lineage, client, lineage.find(run))
    resting = module.check(lineage, found)
    if resting and not force:
        raise UserError(
            "\n".join(
                [*(f"run: {line}" for line in resting), "run: others rest on it; delete those first, or say --force"]
            )
        )
    click.echo("\n".join(found.lines()))
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("--yes: is needed where nobody can be asked")
        click.confirm("Delete?", abort=True)
    module.delete(lineage, client, found)
    click.echo("deleted")


@_command(
    "repeat",
    "Repeat a run of a recipe from what MLflow has of it, and tell whether the numbers are the same.",
    "Refused where the data differ, warned of where the code does. KEY=VALUE says what may differ: storage=, name=, dataset.root=, tracking.uri=, "
    "scale.workers= ... Without storage= it is repeated in ./runs, under the name of the recipe and -repeat.",
    WHICH,
)
@RUN
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--from",
    "origin",
    multiple=True,
    metavar="WORD",
    help="Where the run is kept: as `firstlight show` takes it, e.g. storage=/old/runs.",
)
@click.option("--exact", is_flag=True, help="Refuse to repeat it with other code.")
@click.option("-v", "--verbose", is_flag=True, help="Show the logs of Ray and the traceback of a failure.")
def repeat(run: str, overrides: tuple[str, ...], origin: tuple[str, ...], exact: bool, verbose: bool) -> None:
    import os

    if verbose:
        os.environ["FIRSTLIGHT_VERBOSE"] = "1"
    from firstlight.pipeline.cli import repeat as module
    from firstlight.pipeline.run.runner import run as run_recipe

    original = module.original(named(origin), run)
    recipe = module.recipe_of(original, overrides)
    console = Console(stderr=True)
    module.check_code(original, console, exact)
    run_recipe(recipe, console, repeats=original.repeats)
    found = module.compare(original, recipe)
    _print(module.table(found))
    found.check()


@_command("ui", "Open MLflow's pages on the runs, at 127.0.0.1 only, until Ctrl-C.", WHERE)
@WORDS
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=5000,
    show_default=True,
    help="Where this one is taken, the next free one.",
)
def ui(where: tuple[str, ...], port: int) -> None:
    from firstlight.pipeline.cli import ui as module
    from firstlight.pipeline.tracking.lineage import read

    records = named(where)
    lineage, _ = read(records)
    if not records.local:
        click.echo(module.page(records.uri.rstrip("/"), lineage.experiment))
        return
    free = module.free_port(port)
    if free != port:
        click.echo(f"port {port} is taken: {free}")
    click.echo(f"MLflow starts on {records.uri} ...")
    try:
        module.serve(records, lineage.experiment, free, click.echo)
    except KeyboardInterrupt:
        click.echo("ended")


@_command(
    "doctor", "Check machine, versions, GPUs, MLflow and storage for Firstlight, or for a recipe, and say what to mend."
)
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--ray", is_flag=True, help="Start Ray, or join the recipe's cluster, and compare its nodes.")
def doctor(recipe: Path | None, overrides: tuple[str, ...], ray: bool) -> None:
    from firstlight.pipeline.cli import doctor as module
    from firstlight.pipeline.cli.findings import plain, table

    found = module.examine(recipe, overrides, ray)
    if sys.stdout.isatty():
        Console().print(table(found))
    else:
        click.echo(plain(found))
    module.check(found)


COMMANDS = (runs, show, promote, delete, repeat, ui, doctor)
