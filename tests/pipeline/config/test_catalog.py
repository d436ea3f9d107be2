"""The listing of recipes: from the files alone, in a terminal and in a pipe."""

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from firstlight.pipeline.cli.main import cli
from firstlight.pipeline.config.catalog import build_catalog_table, format_catalog_tsv, list_recipes
from firstlight.pipeline.errors import UserError

NEEDS = "needs: {data: CIFAR-10, gpus: 1, hours: 2.5, estimate: a guess}\n"
EXPECTED = """expected:
  - {stage: a, measure: knn, paper: 89.2, source: table 1}
  - {stage: b, measure: knn, paper: 70.0, against: 60.5, source: table 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "table1.yaml").write_text(NEEDS + EXPECTED)
    (tmp_path / "plain.yaml").write_text("name: plain\n")
    return tmp_path


def test_recipes_of_the_folder_itself_come_first(folder: Path) -> None:
    first, second = list_recipes(folder)
    assert first.format_cells() == ("plain", "", "", "", "")
    assert second.format_cells() == ("paper/table1", "CIFAR-10", "1", "2.5", "knn 89.2 (table 1), and 1 more")


def test_catalog_as_table_and_as_tab_separated_lines(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(build_catalog_table(list_recipes(folder)))
    assert isinstance(console.file, io.StringIO)
    assert "paper/table1 │ CIFAR-10 │    1 │   2.5 │ knn 89.2 (table 1), and 1 more" in console.file.getvalue()
    assert (
        format_catalog_tsv(list_recipes(folder)).splitlines()[2]
        == "paper/table1\tCIFAR-10\t1\t2.5\tknn 89.2 (table 1), and 1 more"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (NEEDS.replace("gpus: 1", "gpus: some"), 'needs.gpus: "some" is not valid'),
        (NEEDS.replace("estimate", "estimated"), "needs.estimate: is missing"),
        (EXPECTED.replace("paper: 89.2", "paper: high"), 'expected.0.paper: "high" is not valid'),
    ],
)
def test_mistake_is_named_with_its_file(folder: Path, text: str, told: str) -> None:
    (folder / "plain.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        list_recipes(folder)
    assert str(error.value).startswith(f"{folder / 'plain.yaml'}: {told}")


def test_command_lists_the_shipped_recipes() -> None:
    lines = CliRunner().invoke(cli, ["recipes"]).output.splitlines()
    assert lines[0].split("\t")[0] == "recipe"
    assert any(line.startswith("nat/table3\t") and "accuracy 36 (table 3" in line for line in lines)
