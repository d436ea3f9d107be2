"""The command that sends work to a cluster."""

from pathlib import Path

import click

from firstlight.pipeline.errors import Terminated


@click.command(
    "submit",
    help="Run a recipe as a job of a Ray cluster, and follow it until it has ended; its exit code is passed on.\n\n"
    "The recipe as it resolves and the source of Firstlight are sent, nothing else. Ctrl-C leaves the job running, and says how to see and to stop "
    "it. See docs/cluster.md.",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    help="Of the cluster's dashboard, e.g. http://127.0.0.1:8265.",
)
@click.option(
    "--installed",
    is_flag=True,
    help="Run the Firstlight that the cluster has installed (in its image, say), and send the recipe alone.",
)
@click.option("--detach", is_flag=True, help="Do not wait for it to end.")
@click.option(
    "--smoke", is_flag=True, help="A trial run of a minute: the recipe with its section `smoke` laid over it."
)
@click.option("-v", "--verbose", is_flag=True, help="Show the logs of Ray as well.")
def submit(
    recipe: Path, overrides: tuple[str, ...], address: str, installed: bool, detach: bool, smoke: bool, verbose: bool
) -> int:
    from firstlight.pipeline.cli import submit as module

    address = address.rstrip("/")
    resolved = module.resolve(recipe, overrides, smoke)
    for doubt in (*module.check_address(address), *module.check_places(resolved)):
        click.echo(f"note {doubt}", err=True)
    client = module.connect(address)
    job = module.send(client, address, recipe, resolved, not installed, verbose)
    click.echo(f"sent: {job.id}", err=True)
    if detach:
        click.echo(job.ways(), err=True)
        return 0
    try:
        return module.follow(client, job, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt as stopped:
        click.echo(f"\n{job.ways()}", err=True)
        return 143 if isinstance(stopped, Terminated) else 130


COMMANDS = (submit,)
