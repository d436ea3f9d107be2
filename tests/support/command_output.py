"""Commands that run in the process of a test."""

from click.testing import CliRunner

from firstlight.pipeline.cli.main import cli


def run_command(*arguments: str) -> str:
    """Returns what a command prints; its errors are raised."""
    return CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False).output
