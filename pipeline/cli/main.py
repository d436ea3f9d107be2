"""firstlight <command> recipe.yaml key=value ...

Exit codes: 0 done, 1 a stage failed, 2 a mistake in the recipe, the files or the machine (one line on stderr each), 130 Ctrl-C, 143 SIGTERM.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from firstlight.pipeline.cli import cluster, runs
from firstlight.pipeline.errors import StageFailed, StopTraining, Terminated, UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe

DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
)  # a disk that is full, or takes nothing any more
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
SMOKE = click.option(
    "--smoke", is_flag=True, help="A trial run of a minute: the recipe with its section `smoke` laid over it."
)
VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Show the logs of Ray and the traceback of a failure.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="firstlight")
def cli() -> None:
    """Unsupervised and semi-supervised visual pretraining on Ray, tracked in MLflow.

    A recipe is one YAML file (see conf/recipe). Any of its settings can be overridden: stages.pretrain.epochs=20 scale.workers=2
    """


@cli.command()
@RECIPE
@OVERRIDES
@SMOKE
def config(recipe: Path, overrides: tuple[str, ...], smoke: bool) -> None:
    """Print the resolved configuration of a recipe."""
    from firstlight.pipeline.config import recipe as config_module
    from firstlight.pipeline.config import yaml_reader

    click.echo(yaml_reader.dump(config_module.load(recipe, overrides, smoke).dump()), nl=False)


@cli.command()
def recipes() -> None:
    """List the recipes that ship with Firstlight: their data, GPUs and hours, and a number of the paper."""
    from firstlight.pipeline.config.catalog import listed, listing, plain

    found = listed()
    if sys.stdout.isatty():
        Console().print(listing(found))
    else:
        click.echo(plain(found))


def _command(name: str, help_text: str, only: str | None) -> None:
    @cli.command(name, help=help_text)
    @RECIPE
    @OVERRIDES
    @SMOKE
    @VERBOSE
    def command(recipe: Path, overrides: tuple[str, ...], smoke: bool, verbose: bool) -> None:
        if verbose:
            os.environ["FIRSTLIGHT_VERBOSE"] = "1"
        _run(recipe, overrides, only, smoke)


_command("run", "Run a recipe: every stage that is not done yet, and the table at the end.", None)
_command("prepare", "Only write the store: images checked, numbered and sharded.", "prepare")
_command("pretrain", "Prepare, and run the pretraining stages of a recipe.", "pretrain")
_command("evaluate", "Run the evaluation stages of a recipe: weighted kNN and linear probe.", "evaluate")
_command(
    "retrieve",
    "Run the retrieval stages of a recipe: an index of features, and what the nearest images are.",
    "retrieve",
)
_command("embed", "Run the embedding stages of a recipe: embeddings of its images, as Parquet.", "embed")
_command(
    "export",
    "Run the export stages of a recipe: its encoder for torchvision, timm, ONNX and torch.export, and a model card.",
    "export",
)
_command("finetune", "Run the fine-tuning stages of a recipe, beside training from scratch.", "finetune")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@OVERRIDES
@VERBOSE
def search(file: Path, overrides: tuple[str, ...], verbose: bool) -> None:
    """Search settings of a recipe: trials side by side, judged on held-out images (see conf/search).

    Keys of the search (trials=20) and of its recipe (dataset.root=/data) can be overridden. Stopped and run again it goes on.
    """
    if verbose:
        os.environ["FIRSTLIGHT_VERBOSE"] = "1"
    _search(file, overrides)


def _search(file: Path, overrides: tuple[str, ...]) -> None:
    from firstlight.pipeline.report.score_table import table
    from firstlight.pipeline.search import search as module
    from firstlight.pipeline.search.checks import read
    from firstlight.pipeline.search.progress import closing

    plan = read(file, overrides)
    found = module.search(plan, Console(stderr=True))
    out = _out()
    out.print(closing(plan.search, found.trials, found.best, found.promoted))
    if found.retrained:
        out.print(table(found.retrained, found.rows))
    if found.report:
        _tell_report(out, found.report)
    _tell_where(out, plan.base())


def _out() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def _tell_report(out: Console, file: Path) -> None:
    out.print(f"Report:  {file}", soft_wrap=True, highlight=False)


def _tell_where(out: Console, recipe: "Recipe") -> None:
    from firstlight.pipeline.cli.ui import hint
    from firstlight.pipeline.tracking.location import Records

    out.print(f"Results, curves and pictures:  {hint(Records.of(recipe))}", soft_wrap=True, highlight=False)


for _each in (*runs.COMMANDS, *cluster.COMMANDS):
    cli.add_command(_each)


def _run(path: Path, overrides: tuple[str, ...], only: str | None, smoke: bool) -> None:
    from firstlight.pipeline.config.recipe import load
    from firstlight.pipeline.report.run_report import FILE
    from firstlight.pipeline.report.score_table import table
    from firstlight.pipeline.run.runner import run
    from firstlight.pipeline.tracking.retry import Unpublished

    recipe = load(path, overrides, smoke)
    console = Console(stderr=True)
    out = _out()
    try:
        found = run(recipe, console, only)
    except Unpublished as error:
        if error.found:
            out.print(table(recipe, error.found))
        raise
    if found:
        out.print(table(recipe, found))
    report = recipe.storage.resolve() / recipe.name / FILE
    if report.exists():
        _tell_report(out, report)
    _tell_where(out, recipe)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def guarded(function: Callable[[], int | None]) -> int:
    """Run, and turn what went wrong into lines on stderr and an exit code. What the function answers, if anything, is the exit code, too."""
    try:
        return function() or 0
    except UserError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (StopTraining, StageFailed) as error:
        if os.environ.get("FIRSTLIGHT_VERBOSE"):
            raise
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
        return 1
    except OSError as error:
        if error.errno not in DISK or os.environ.get("FIRSTLIGHT_VERBOSE"):
            raise
        file = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(
            f"error: {file}{error.strerror}; what was finished is kept: run the same command again to continue\n"
        )
        return 1
    except (KeyboardInterrupt, click.Abort) as error:  # click wraps the one in the other
        sys.stderr.write("stopped; run the same command again to continue\n")
        return 143 if isinstance(error.__cause__ or error, Terminated) else 130


def main() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(guarded(lambda: cli(standalone_mode=False)))
