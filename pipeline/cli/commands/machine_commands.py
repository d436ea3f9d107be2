"""The commands about this machine and a cluster: their arguments and options.

Each command imports its logic when it is called: `firstlight --help` needs neither torch nor MLflow.
"""

from pathlib import Path

import click

from firstlight.pipeline.cli.options import OVERRIDES_ARGUMENT, RECIPE_ARGUMENT, SMOKE_OPTION
from firstlight.pipeline.cli.output import echo_text, print_table_or_tsv
from firstlight.pipeline.errors import Terminated


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
