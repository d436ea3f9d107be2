"""firstlight <command> recipe.yaml key=value ...

Exit codes: 0 done; 1 a stage failed; 2 a mistake in the recipe, the files or the machine, with one line on stderr for
each; 130 Ctrl-C; 143 SIGTERM.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Group

from firstlight.pipeline.cli.commands import COMMANDS
from firstlight.pipeline.cli.kind_commands import list_command_helps
from firstlight.pipeline.cli.options import (
    OVERRIDES_ARGUMENT,
    RECIPE_ARGUMENT,
    SMOKE_OPTION,
    VERBOSE_OPTION,
    add_first_run_options,
)
from firstlight.pipeline.cli.output import echo_text, print_scores, print_table_or_tsv, results_console
from firstlight.pipeline.errors import StageFailed, StopTraining, Terminated, UserError, one_line
from firstlight.pipeline.files import explain_denied_access
from firstlight.pipeline.process_life import collect_garbage_rarely, end_process
from firstlight.pipeline.terminal import SafeConsole
from firstlight.pipeline.tracking.retry import describe_failure, is_tracking_error

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe

# Errors of a disk that is full or does not accept writes any more, and of files that have disappeared.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
GONE_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV)
# The commands for all stages and for none, with their help. Each kind of stage has one too, of its name.
RECIPE_COMMANDS = {
    "run": "Run every stage that is not done yet, and print the scores.",
    "prepare": "Write the store only: check, number and shard the images.",
}
# The commands that also take images instead of a recipe, and what their help says of it.
FIRST_RUN_GOALS = ("pretrain", "evaluate", "retrieve", "embed", "export", "finetune")
FIRST_RUN_HELP = (
    "With --data and --out a recipe is written for your own images, summarised in a few lines, and run. Its network is "
)


class CommandLine(click.Group):
    """The commands, and one for each kind of stage."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *list_command_helps()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        helps = {} if found is not None else list_command_helps()
        return _build_recipe_command(cmd_name, helps[cmd_name]) if cmd_name in helps else found


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]}, commands=COMMANDS)
@click.version_option(package_name="firstlight")
def cli() -> None:
    """Unsupervised and semi-supervised visual pretraining on Ray, tracked in MLflow.

    A recipe is one YAML file (see conf/recipe). Every setting can be overridden on the command line, for example
    stages.pretrain.epochs=20 scale.workers=2
    """


@cli.command("config")
@RECIPE_ARGUMENT
@OVERRIDES_ARGUMENT
@SMOKE_OPTION
def print_config(recipe: Path, overrides: tuple[str, ...], smoke: bool) -> None:
    """Print a recipe with all overrides and defaults resolved."""
    from firstlight.pipeline.config.yaml_reader import dump_yaml

    echo_text(dump_yaml(_load_checked_recipe(recipe, overrides, smoke).dump()), nl=False)


def _load_checked_recipe(path: Path, overrides: tuple[str, ...], smoke: bool) -> "Recipe":
    """Loads a recipe before anything is imported that it does not need, so that its mistakes are found at once."""
    # Its import makes the kinds of stages known to recipes.
    import firstlight.pipeline.stages.sections.known  # noqa: F401
    from firstlight.pipeline.config.load import load_recipe

    return load_recipe(path, overrides, smoke)


@cli.command("recipes")
def print_recipes() -> None:
    """List the shipped recipes: data, GPUs, hours, paper.

    On a terminal, a second table says which method to take for what.
    """
    from firstlight.pipeline.config.catalog import build_catalog_table, format_catalog_tsv, list_recipes
    from firstlight.pipeline.starter.advice import build_advice_table

    entries = list_recipes()
    print_table_or_tsv(
        lambda console: Group(build_catalog_table(entries), "", build_advice_table()),
        lambda: format_catalog_tsv(entries),
    )


def _build_recipe_command(name: str, help_text: str) -> click.Command:
    if name in FIRST_RUN_GOALS:
        start = (
            "continued from --weights, if they are given."
            if name == "pretrain"
            else "pretrained first, or has the weights of --weights."
        )

        @click.command(name, help=f"{help_text}\n\n{FIRST_RUN_HELP}{start}")
        @click.argument("arguments", nargs=-1, metavar="[RECIPE] [KEY=VALUE]...")
        @add_first_run_options
        @SMOKE_OPTION
        @VERBOSE_OPTION
        def run_kind_command(arguments: tuple[str, ...], smoke: bool, **asked: Any) -> None:
            if asked["data"] is not None:
                _run_first_recipe(name, arguments, asked, smoke)
                return
            for key, value in asked.items():
                if value is not None:
                    raise UserError(f"--{key}: needs --data, your own images; a recipe has it as a key")
            if not arguments:
                raise UserError("RECIPE: is missing; valid: a recipe, or --data and --out for your own images")
            _run_and_report(Path(arguments[0]), arguments[1:], name, smoke)

        return run_kind_command

    @click.command(name, help=help_text)
    @RECIPE_ARGUMENT
    @OVERRIDES_ARGUMENT
    @SMOKE_OPTION
    @VERBOSE_OPTION
    def run_recipe_command(recipe: Path, overrides: tuple[str, ...], smoke: bool) -> None:
        _run_and_report(recipe, overrides, None if name == "run" else name, smoke)

    return run_recipe_command


def _run_first_recipe(goal: str, overrides: tuple[str, ...], asked: dict[str, Any], smoke: bool) -> None:
    """Writes the recipe that a command with `--data` asks for, and runs all its stages."""
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text}: cannot be combined with --data, which writes the recipe; valid: KEY=VALUE")
    if smoke:
        raise UserError("--smoke: cannot be combined with --data; valid: --epochs 1")
    data, out, minutes = (asked.pop(key) for key in ("data", "out", "minutes"))
    if out is None:
        raise UserError("--out: is missing: the folder for the recipe and all results")
    from firstlight.pipeline.starter.choices import Wishes
    from firstlight.pipeline.starter.first_run import FirstRun, write_first_run

    file = write_first_run(
        FirstRun(data, out, Wishes(**asked, goal=goal), minutes), lambda line: echo_text(line, err=True)
    )
    _run_and_report(file, overrides, None, smoke=False)


for _name, _help_text in RECIPE_COMMANDS.items():
    cli.add_command(_build_recipe_command(_name, _help_text))


def _run_and_report(path: Path, overrides: tuple[str, ...], only: str | None, smoke: bool) -> None:
    recipe = _load_checked_recipe(path, overrides, smoke)
    from firstlight.pipeline.run.preparing.ahead import write_ahead

    out, console = results_console(), SafeConsole(stderr=True)
    with write_ahead(recipe, console, only) as ahead:
        # They import torch and more, which takes seconds.
        from firstlight.pipeline.report.page_parts import REPORT_FILE
        from firstlight.pipeline.run.runner import run_recipe
        from firstlight.pipeline.tracking.outbox import Unpublished

        try:
            rows = run_recipe(recipe, console, only, ahead=ahead).rows
        except Unpublished as error:
            if error.rows:
                print_scores(out, recipe, error.rows)
            raise
    if rows:
        print_scores(out, recipe, rows)
    report = recipe.storage.resolve() / recipe.name / REPORT_FILE
    if report.exists():
        _print_report_path(out, report)
    _print_ui_command(out, recipe)


@cli.command("search")
@click.argument("file", type=click.Path(path_type=Path))
@OVERRIDES_ARGUMENT
@VERBOSE_OPTION
def search_settings(file: Path, overrides: tuple[str, ...]) -> None:
    """Search settings of a recipe: trials scored on held-out images.

    FILE is a search (see conf/search). Its keys (trials=20) and those of its recipe (dataset.root=/data) can be
    overridden. A search that was stopped continues when it is run again.
    """
    from firstlight.pipeline.search.checks import load_checked_plan
    from firstlight.pipeline.search.progress import summarise_search
    from firstlight.pipeline.search.search import run_search

    plan = load_checked_plan(file, overrides)
    found = run_search(plan, SafeConsole(stderr=True))
    out = results_console()
    out.print(summarise_search(plan.search, found.trials, found.best, found.promoted))
    if found.retrained:
        print_scores(out, found.retrained, found.rows)
    if found.report:
        _print_report_path(out, found.report)
    _print_ui_command(out, plan.budget_recipe())


def _print_report_path(out: SafeConsole, file: Path) -> None:
    out.print(f"Report:  {file}", soft_wrap=True, highlight=False, markup=False)


def _print_ui_command(out: SafeConsole, recipe: "Recipe") -> None:
    from firstlight.pipeline.cli.ui import ui_command
    from firstlight.pipeline.tracking.location import TrackingLocation

    command = ui_command(TrackingLocation.of(recipe))
    out.print(f"Results, curves and pictures:  {command}", soft_wrap=True, highlight=False, markup=False)


def run_guarded(function: Callable[[], int | None]) -> int:
    """Runs `function`, and turns failures into lines on stderr. Returns the exit code, which `function` may give.

    FIRSTLIGHT_VERBOSE lets failures of stages, of the disk and of MLflow pass, for their traceback.
    """
    try:
        return function() or 0
    except UserError as error:
        return _print_error(str(error), 2)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (StopTraining, StageFailed) as error:
        if os.environ.get("FIRSTLIGHT_VERBOSE"):
            raise
        return _print_error(one_line(error, limit=10_000), 1)
    except OSError as error:
        if os.environ.get("FIRSTLIGHT_VERBOSE"):
            raise
        if isinstance(error, PermissionError) and error.filename:
            return _print_error(explain_denied_access(Path(os.fsdecode(error.filename))), 2)
        if error.errno not in DISK_ERRORS and not (error.errno in GONE_ERRORS and error.filename):
            raise
        cause = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        advice = (
            "what was finished is kept: run the same command again to continue"
            if error.errno in DISK_ERRORS
            else "was the storage deleted, moved or unmounted during the run?"
        )
        return _print_error(f"{cause}; {advice}", 1)
    except (KeyboardInterrupt, click.Abort) as error:
        sys.stderr.write("stopped; run the same command again to continue\n")
        # click raises Abort from the KeyboardInterrupt.
        return 143 if isinstance(error.__cause__ or error, Terminated) else 130
    except Exception as error:
        if os.environ.get("FIRSTLIGHT_VERBOSE") or not is_tracking_error(error):
            raise
        return _print_error(f"tracking.uri: MLflow cannot be used: {describe_failure(error)}; run it again", 1)


def _print_error(text: str, code: int) -> int:
    """Prints a line for each mistake. Returns the exit code."""
    for line in text.split("\n"):
        echo_text(f"error: {line}", err=True)
    return code


def _raise_terminated(number: int, frame: Any) -> None:
    raise Terminated


def main() -> None:
    """Runs the command line, and exits with its exit code."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    sys.exit(run_guarded(lambda: cli(standalone_mode=False)))


def run_process() -> NoReturn:
    """Runs the command line in a process that has nothing else to do, and ends it."""
    collect_garbage_rarely()
    try:
        main()
    except SystemExit as exit_:
        end_process(int(exit_.code or 0))
    raise AssertionError("main has returned")
