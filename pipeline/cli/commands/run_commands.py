"""The commands about recorded runs: their arguments and options.

Each command imports its logic when it is called: `firstlight --help` needs neither torch nor MLflow.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click

from firstlight.pipeline.cli.options import (
    LOCATION_ARGUMENT,
    LOCATION_HELP,
    ORIGIN_OPTION,
    OVERRIDES_ARGUMENT,
    RUN_ARGUMENT,
    RUN_HELP,
    VERBOSE_OPTION,
    read_location,
)
from firstlight.pipeline.cli.output import echo_text, print_table_or_tsv, print_view
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.terminal import SafeConsole


@click.command("runs", epilog=LOCATION_HELP)
@LOCATION_ARGUMENT
@click.option("-n", "--name", default="", help="List only recipes and searches whose name contains this text.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="The number of recipes and searches to list.",
)
def print_runs(location: tuple[str, ...], name: str, limit: int) -> None:
    """List recipes and searches with their stages and trials.

    Each line has the state, the scores, and the reference that a recipe can take as `encoder`.
    """
    from firstlight.pipeline.cli.history import run_lines, runs_table, runs_tsv
    from firstlight.pipeline.tracking.database import read_runs

    lineage = read_runs(read_location(location))
    lines = list(run_lines(lineage, name, limit))
    print_table_or_tsv(lambda console: runs_table(lineage, lines, console.width), lambda: runs_tsv(lineage, lines))


@click.command("show", epilog=f"{RUN_HELP}\n\n{LOCATION_HELP}")
@RUN_ARGUMENT
@LOCATION_ARGUMENT
def show_run(run: str, location: tuple[str, ...]) -> None:
    """Show what a run was made from, and what was made from it.

    The tree goes from the data to the models, and includes what other recipes made.
    """
    from firstlight.pipeline.cli.tree import build_run_view
    from firstlight.pipeline.tracking.database import read_runs

    lineage = read_runs(read_location(location))
    print_view(build_run_view(lineage, lineage.find_run(run), time.time()))


@click.command("compare", epilog=f"{RUN_HELP}\n\n{LOCATION_HELP}")
@click.argument("words", nargs=-1, metavar="RUN RUN... [KEY=VALUE]...", required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True, help="The page to write."
)
def compare_runs(words: tuple[str, ...], out: Path) -> None:
    """Compare runs of recipes: scores, gains, settings.

    The first run is the one that the others are compared with, seed by seed, with an interval and a verdict for each
    score. Settings that differ are listed. A page has the same.
    """
    from firstlight.pipeline.files import write_atomically
    from firstlight.pipeline.report.scores.run_comparison import (
        build_comparison_view,
        read_comparison,
        render_comparison,
    )
    from firstlight.pipeline.tracking.lineage import read_lineage

    names = [word for word in words if "=" not in word]
    if len(names) < 2:
        raise UserError("run: two runs or more are compared; valid: firstlight compare RUN RUN")
    lineage, _ = read_lineage(read_location(tuple(word for word in words if "=" in word)))
    comparison = read_comparison(lineage, names)
    print_view(build_comparison_view(comparison))
    write_atomically(out, render_comparison(comparison).encode())
    echo_text(f"page: {out}")


@click.command("promote", epilog=f"{RUN_HELP}\n\n{LOCATION_HELP}")
@RUN_ARGUMENT
@LOCATION_ARGUMENT
@click.option("--name", required=True, help="The name of the encoder in MLflow's model registry.")
@click.option("--alias", default="current", show_default=True, help="The alias that leads to this version from now on.")
def promote_run(run: str, location: tuple[str, ...], name: str, alias: str) -> None:
    """Give an encoder or a fine-tuned model a name and an alias.

    RUN may also be a trial, or a recipe with one pretraining stage: the encoder is that of its first seed.
    """
    from firstlight.pipeline.cli.promote import find_pretraining, promote_encoder
    from firstlight.pipeline.tracking.lineage import read_lineage

    lineage, client = read_lineage(read_location(location))
    found = lineage.find_run(run)
    reference = promote_encoder(lineage, client, found, name, alias)
    pretraining = find_pretraining(lineage, found)
    echo_text(f"{reference} is now the {pretraining.artifact} of {pretraining.name} ({pretraining.short_id})")


@click.command("delete", epilog=f"{RUN_HELP}\n\n{LOCATION_HELP}")
@RUN_ARGUMENT
@LOCATION_ARGUMENT
@click.option("-y", "--yes", is_flag=True, help="Delete without a question.")
@click.option("--force", is_flag=True, help="Delete even if other runs depend on it.")
def delete_run(run: str, location: tuple[str, ...], yes: bool, force: bool) -> None:
    """Delete a run and everything below it.

    This deletes stages, trials, models, artifacts, and their folders on disk, and keeps stores of images. The command
    lists what it would delete, and asks. `firstlight run` makes again what was deleted.
    """
    from firstlight.pipeline.cli.delete import check_deletion, delete_runs, plan_deletion
    from firstlight.pipeline.tracking.lineage import read_lineage

    lineage, client = read_lineage(read_location(location))
    plan = plan_deletion(lineage, client, lineage.find_run(run))
    dependants = check_deletion(lineage, plan)
    if dependants and not force:
        refusal = "run: other runs depend on it; delete those first, or give --force"
        raise UserError("\n".join([*(f"run: {line}" for line in dependants), refusal]))
    echo_text("\n".join(plan.summary_lines()))
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("--yes: is needed if stdin is not a terminal")
        click.confirm("Delete?", abort=True)
    delete_runs(lineage, client, plan)
    echo_text("deleted")


@click.command("repeat", epilog=RUN_HELP)
@RUN_ARGUMENT
@OVERRIDES_ARGUMENT
@ORIGIN_OPTION
@click.option("--exact", is_flag=True, help="Refuse to repeat a run that was made by other code.")
@VERBOSE_OPTION
def repeat_run(run: str, overrides: tuple[str, ...], origin: tuple[str, ...], exact: bool) -> None:
    """Repeat a recipe from its record in MLflow; compare the numbers.

    The command refuses other data, and prints a note about other code. KEY=VALUE may change storage=, name=,
    dataset.root=, tracking.uri=, scale.workers= and similar keys, but nothing that decides the numbers. Without
    storage= the repetition is kept in ./runs, under the name of the recipe followed by -repeat.
    """
    from firstlight.pipeline.cli.repeat import (
        check_code,
        compare_numbers,
        comparison_table,
        find_original,
        recipe_to_repeat,
    )
    from firstlight.pipeline.run.runner import run_recipe

    original = find_original(read_location(origin), run)
    recipe = recipe_to_repeat(original, overrides)
    console = SafeConsole(stderr=True)
    check_code(original, console, exact)
    run_recipe(recipe, console, repeats=original.repeats)
    comparison = compare_numbers(original, recipe)
    print_view(comparison_table(comparison))
    comparison.raise_if_different()


@click.command("ui", epilog=LOCATION_HELP)
@LOCATION_ARGUMENT
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=5000,
    show_default=True,
    help="The port of the web interface; if it is taken, the next free one.",
)
def open_ui(location: tuple[str, ...], port: int) -> None:
    """Open MLflow's web interface on the runs, until Ctrl-C.

    It can be reached from this machine only, at 127.0.0.1.
    """
    from firstlight.pipeline.cli.ui import free_port, runs_address, serve_ui
    from firstlight.pipeline.tracking.lineage import read_lineage

    records = read_location(location)
    lineage, _ = read_lineage(records)
    if not records.is_local:
        echo_text(runs_address(records.uri.rstrip("/"), lineage.experiment_id))
        return
    free = free_port(port)
    if free != port:
        echo_text(f"port {port} is taken; using {free}")
    echo_text(f"MLflow starts on {records.uri} ...")
    try:
        serve_ui(records, lineage.experiment_id, free, echo_text)
    except KeyboardInterrupt:
        echo_text("ended")


@click.command("push", epilog=f"{RUN_HELP}\n\n{LOCATION_HELP}")
@click.argument("source", metavar="RUN_OR_FOLDER")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", "is_private", is_flag=True, help="Make a new repository private; push to no public one.")
@click.option("--revision", "branch", default="main", show_default=True, help="The branch; made if it does not exist.")
@click.option("--dry-run", is_flag=True, help="List the files and the front matter. Nothing is sent.")
@ORIGIN_OPTION
def push_export(source: str, repository: str, dry_run: bool, origin: tuple[str, ...], **options: Any) -> None:
    """Push an export to the Hugging Face hub.

    RUN_OR_FOLDER is the folder `export` of a stage export, its run, or a recipe with one such stage. The model card
    becomes README.md; where timm loads the network, so does `timm.create_model("hf-hub:OWNER/NAME")`. The token is that
    of `hf auth login`, or HF_TOKEN.
    """
    from firstlight.pipeline.report.publish.hub import HubTarget, describe_push, open_export, push_folder
    from firstlight.pipeline.report.publish.hub_files import list_hub_files

    target = HubTarget(repository, **options)
    target.check_names()
    with open_export(source, read_location(origin)) as folder:
        if dry_run:
            echo_text("\n".join(describe_push(list_hub_files(folder), target)))
        else:
            echo_text(f"pushed: {push_folder(folder, target)}")
