"""The options that several commands share."""

import os

import click
import pytest
from click.testing import CliRunner

from firstlight.pipeline.cli.options import VERBOSE_OPTION


@click.command()
@VERBOSE_OPTION
def print_variable() -> None:
    click.echo(os.environ.get("FIRSTLIGHT_VERBOSE", "unset"))


@pytest.mark.parametrize(("arguments", "value"), [([], "unset"), (["-v"], "1"), (["--verbose"], "1")])
def test_verbose_sets_the_variable_that_workers_read(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], value: str
) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "FIRSTLIGHT_VERBOSE"})
    assert CliRunner().invoke(print_variable, arguments).output == f"{value}\n"
