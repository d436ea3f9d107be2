"""The commands about recorded runs, clusters and the machine: their arguments and options.

Each command imports its logic when it is called: `firstlight --help` needs neither torch nor MLflow.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firstlight.pipeline.cli.options import (
    LOCATION_ARGUMENT,
    LOCATION_HELP,
    OVERRIDES_ARGUMENT,
    RECIPE_ARGUMENT,
    RUN_ARGUMENT,
    RUN_HELP,
    SMOKE_OPTION,
    VERBOSE_OPTION,
)
from firstlight.pipeline.cli.output import echo_text, print_table_or_tsv, print_view
from firstlight.pipeline.errors import Terminated, UserError
from firstlight.pipeline.terminal import SafeConsole

if TYPE_CHECKING:
    from firstlight.pipeline.tracking.location import TrackingLocation


def _read_location(words: Sequence[str]) -> "TrackingLocation":
    """Returns where the runs are that a command is about."""
    from firstlight.pipeline.tracking.location import parse_location

    return parse_location(words)


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

    lineage = read_runs(_read_location(location))
    lines = list(run_lines(lineage, name, limit))
    print_table_or_tsv(lambda console: runs_table(lineage, lines, console.width), lambda: runs_tsv(lineage, lines))


@click.command("init")
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The file to write. Its name is that of the recipe.",
)
@click.option("--model", help="The network: an encoder of Firstlight, or a name of timm's.")
@click.option("--weights", help="The weights to go on from, as encoder.weights. They need --model.")
@click.option("--method", help="The objective, for example simclr.")
@click.option("--epochs", type=click.IntRange(min=1), help="The length of the pretraining.")
def init_recipe(
    images: Path, out: Path, model: str | None, weights: str | None, method: str | None, epochs: int | None
) -> None:
    """Write a recipe for your own images.

    IMAGES is a folder of images, or a file that lists them. Settings are chosen from the images and this machine, and
    told; the recipe is a file to change.
    """
    from firstlight.pipeline.run.auto_scale import find_local_gpus
    from firstlight.pipeline.starter.choices import Wishes, choose_settings
    from firstlight.pipeline.starter.recipe_text import write_recipe
    from firstlight.pipeline.starter.survey import survey_images

    survey = survey_images(images)
    chosen = choose_settings(survey, Wishes(model, weights, method, epochs), find_local_gpus().count > 0)
    write_recipe(out, survey, chosen)
    echo_text("\n".join(chosen.reasons))
    echo_text(f"written; next: firstlight run {shlex.quote(str(out))}")


@click.command("look")
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("look"), show_default=True, help="The folder.")
@click.option("--model", help="With --weights: the network, a name of timm's.")
@click.option("--weights", help="Compare by a network with these weights, as encoder.weights, instead of by pixels.")
@click.option(
    "--similarity",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=0.97,
    show_default=True,
    help="The least cosine of near duplicates.",
)
@click.option("--diverse", type=click.IntRange(min=1), help="The number of images of the diverse subset.")
@click.option(
    "--export",
    multiple=True,
    metavar="PROGRAM",
    help="Also write the images for embedding-atlas or fiftyone. Can be given twice.",
)
@click.option(
    "--images", "count", type=click.IntRange(min=2), default=20_000, show_default=True, help="The most to compare."
)
def look_at_folder(images: Path, out: Path, count: int, **options: Any) -> None:
    """Look at your own images before you train on them.

    IMAGES is a folder of images, or a file that lists them. One page shows the census, a map, near duplicates, likely
    leaks between train and test, odd ones out and a diverse subset; lists say what to leave out and what to take.
    """
    from firstlight.pipeline.look.look import LookRequest, look_at_images

    page = look_at_images(LookRequest(images, out, count, **options), SafeConsole(stderr=True), echo_text)
    echo_text(f"page: {page}")


@click.command("show", epilog=f"{RUN_HELP}\n\n{LOCATION_HELP}")
@RUN_ARGUMENT
@LOCATION_ARGUMENT
def show_run(run: str, location: tuple[str, ...]) -> None:
    """Show what a run was made from, and what was made from it.

    The tree goes from the data to the models, and includes what other recipes made.
    """
    from firstlight.pipeline.cli.tree import build_run_view
    from firstlight.pipeline.tracking.database import read_runs

    lineage = read_runs(_read_location(location))
    print_view(build_run_view(lineage, lineage.find_run(run), time.time()))


@click.command("compare", epilog=f"{RUN_HELP}\n\n{LOCATION_HELP}")
@click.argument("words", nargs=-1, metavar="RUN RUN... [KEY=VALUE]...", required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True, help="The page."
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
    lineage, _ = read_lineage(_read_location(tuple(word for word in words if "=" in word)))
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

    lineage, client = read_lineage(_read_location(location))
    found = lineage.find_run(run)
    reference = promote_encoder(lineage, client, found, name, alias)
    pretraining = find_pretraining(lineage, found)
    what = "model" if pretraining.kind == "finetune" else "encoder"
    echo_text(f"{reference} is now the {what} of {pretraining.name} ({pretraining.short_id})")


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

    lineage, client = read_lineage(_read_location(location))
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
@click.option(
    "--from",
    "origin",
    multiple=True,
    metavar="LOCATION",
    help="Where the run is kept, as `firstlight show` takes it, for example storage=/old/runs.",
)
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

    original = find_original(_read_location(origin), run)
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

    records = _read_location(location)
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
@click.option(
    "--from",
    "origin",
    multiple=True,
    metavar="LOCATION",
    help="Where the run is kept, as `firstlight show` takes it, for example storage=/old/runs.",
)
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
    with open_export(source, _read_location(origin)) as folder:
        if dry_run:
            echo_text("\n".join(describe_push(list_hub_files(folder), target)))
        else:
            echo_text(f"pushed: {push_folder(folder, target)}")


@click.command("predict")
@click.argument("model", metavar="MODEL")
@click.argument("paths", nargs=-1, required=True, metavar="PATHS...")
@click.option("--out", metavar="PATH", help="Where predictions are written: predictions.parquet, .json or a folder.")
@click.option("--force", is_flag=True, help="Replace earlier predictions at --out.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images that are computed at a time.",
)
@click.option(
    "--top", type=click.IntRange(1, 20), default=3, show_default=True, help="The number of classes in the table."
)
@click.option("--split", metavar="NAME", help="The only split of a store that is predicted.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Predict on Ray with so many copies of the model; 0 is this process.",
)
@click.option("--gpus-per-worker", type=click.FloatRange(min=0.0), default=0.0, help="GPUs of each copy on Ray.")
@click.option(
    "--from",
    "origin",
    multiple=True,
    metavar="LOCATION",
    help="Where the model's run is kept, as `firstlight show` takes it, for example storage=/old/runs.",
)
@VERBOSE_OPTION
def predict_images(model: str, paths: tuple[str, ...], origin: tuple[str, ...], **options: Any) -> int:
    """Predict with a fine-tuned model: classes, masks or boxes.

    MODEL is the folder `model` of a finetune stage, models:/name@alias or runs:/RUN/model. PATHS are images, folders,
    patterns such as 'photos/*.jpg', or the folder of one store. Images that cannot be read are listed, and the exit
    code is then 1.
    """
    from firstlight.pipeline.cli.predict import PredictionOptions, run_predictions

    return run_predictions(model, paths, _read_location(origin), PredictionOptions(**options))


@click.command("doctor")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@OVERRIDES_ARGUMENT
@click.option("--ray", is_flag=True, help="Start Ray, or join the recipe's cluster, and compare its nodes.")
def check_machine(recipe: Path | None, overrides: tuple[str, ...], ray: bool) -> None:
    """Check this machine for Firstlight or for a recipe.

    The command checks CPUs, memory, disks, versions, GPUs, the storage and MLflow, and says what to do about each
    problem.
    """
    from firstlight.pipeline.cli.doctor import run_checks
    from firstlight.pipeline.cli.findings import findings_table, findings_tsv, raise_on_problem

    findings = run_checks(recipe, overrides, ray)
    print_table_or_tsv(lambda console: findings_table(findings), lambda: findings_tsv(findings))
    raise_on_problem(findings)


@click.command("submit", epilog="See docs/cluster.md.")
@RECIPE_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    help="The address of the cluster's dashboard, for example http://127.0.0.1:8265.",
)
@click.option(
    "--installed",
    is_flag=True,
    help="Send the recipe alone, and run the Firstlight that the cluster has installed, for example in its image.",
)
@click.option("--detach", is_flag=True, help="Do not wait for the job to end.")
@SMOKE_OPTION
@click.option("-v", "--verbose", is_flag=True, help="Show the logs of Ray, and the traceback of a failure.")
def submit_recipe(
    recipe: Path, overrides: tuple[str, ...], address: str, installed: bool, detach: bool, smoke: bool, verbose: bool
) -> int:
    """Run a recipe as a job of a Ray cluster.

    The command sends the resolved recipe and the source of Firstlight, nothing else. It follows the job until it ends,
    and returns the exit code of the job. After Ctrl-C the job continues; the command says how to follow it again and
    how to stop it.
    """
    from firstlight.pipeline.cli.submit import (
        check_address,
        check_paths,
        connect_to_cluster,
        follow_job,
        resolve_recipe,
        send_job,
    )

    address = address.rstrip("/")
    resolved = resolve_recipe(recipe, overrides, smoke)
    for warning in (*check_address(address), *check_paths(resolved)):
        echo_text(f"note {warning}", err=True)
    client = connect_to_cluster(address)
    job = send_job(client, address, recipe, resolved, not installed, verbose)
    echo_text(f"sent: {job.id}", err=True)
    if detach:
        echo_text(job.instructions(), err=True)
        return 0
    try:
        return follow_job(client, job, lambda text: echo_text(text, nl=False))
    except KeyboardInterrupt as stopped:
        echo_text(f"\n{job.instructions()}", err=True)
        return 143 if isinstance(stopped, Terminated) else 130


COMMANDS = (
    init_recipe,
    look_at_folder,
    print_runs,
    show_run,
    compare_runs,
    promote_run,
    delete_run,
    repeat_run,
    open_ui,
    push_export,
    predict_images,
    check_machine,
    submit_recipe,
)
