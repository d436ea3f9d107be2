import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.score_table import Row, facts, rows, table
from firstlight.pipeline.stages.stage import RESULT, Instance
from firstlight.pipeline.train.metrics import METRICS
from tests.support import recipes


def row(pretrained: list[float], baseline: list[float]) -> Row:
    return Row("finetune", "classify, 40 labels", "scratch", tuple(pretrained), tuple(baseline))


def gains(*percent: float) -> Row:
    return row([0.5 + p / 100 for p in percent], [0.5] * len(percent))


@pytest.mark.parametrize(
    ("its", "verdict"),
    [
        (gains(2.0, 2.5, 3.0), "helps"),
        (gains(-2.0, -2.5, -3.0), "hurts"),
        (gains(5.0, 5.0), "helps"),
        (gains(0.0, 0.0, 0.0), "no clear difference"),
        (gains(4.0, 5.0, -0.1), "no clear difference"),
        (
            gains(10.0, 10.0, 10.0, 10.0, 10.0, 10.0, -0.01),
            "no clear difference",
        ),  # far above its error, but one seed loses
        (gains(0.1, 5.0, 0.1), "no clear difference"),  # every seed gains, but by anything
        (gains(7.0), "one seed: no verdict"),
        (gains(-7.0), "one seed: no verdict"),
    ],
)
def test_verdict(its: Row, verdict: str) -> None:
    assert its.verdict == verdict


@pytest.mark.parametrize("spread", [0.9, 1.1])
def test_the_mean_gain_must_be_above_twice_its_standard_error(spread: float) -> None:
    """Gains m - s, m, m + s have the standard error s / sqrt(3): the bound is s = m sqrt(3) / 2."""
    s = spread * 4 * np.sqrt(3) / 2
    assert gains(4 - s, 4, 4 + s).verdict == ("helps" if spread < 1 else "no clear difference")


def test_the_gain_is_paired_by_seed_and_in_percent() -> None:
    its = row([0.6, 0.8], [0.5, 0.75])
    np.testing.assert_allclose(its.gain, [10, 5])


def shown(found: list[Row], tmp_path: Path, seeds: list[int]) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(table(recipes.recipe(tmp_path, seeds=seeds), found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_table_has_means_and_standard_deviations_over_seeds(tmp_path: Path, sign: int) -> None:
    a, b = np.array([0.61, 0.655, 0.63]), np.array([0.5, 0.52, 0.47])
    a, b = (a, b) if sign > 0 else (b, a)
    lines = shown([row(a.tolist(), b.tolist())], tmp_path, [0, 1, 2])
    gain = 100 * (a - b)
    cells = [f"{100 * v.mean():.2f} ± {100 * v.std(ddof=1):.2f}" for v in (a, b)]
    assert lines[0].strip() == "small: test scores (%), 3 seeds"
    line = next(line for line in lines if "classify" in line)
    found = [cell.strip() for cell in line.split("│")[1:-1]]
    expected = f"{'+' if sign > 0 else ''}{gain.mean():.2f} ± {gain.std(ddof=1):.2f}"
    assert found == [
        "finetune",
        "classify, 40 labels",
        cells[0],
        "scratch",
        cells[1],
        expected,
        "helps" if sign > 0 else "hurts",
    ]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    lines = shown([gains(7.0)], tmp_path, [0])
    assert lines[0].strip() == "small: test scores (%), 1 seed"
    assert "±" not in "".join(lines)
    assert "57.00" in "".join(lines)
    assert "+7.00" in "".join(lines)
    assert "one seed: no verdict" in "".join(lines)


def finished(tmp_path: Path, stage: str, seed: int, result: dict[str, Any] | None) -> Instance:
    folder = tmp_path / f"{stage}-{seed}"
    folder.mkdir()
    if result is not None:
        (folder / RESULT).write_text(json.dumps(result))
    return Instance(stage, seed, "f", folder)


def evaluated(offset: float) -> dict[str, Any]:
    return {
        arm: {measure: {"val": 0.0, "test": base + offset} for measure, base in scores.items()}
        for arm, scores in {"pretrained": {"knn": 0.5, "probe": 0.6}, "random": {"knn": 0.1, "probe": 0.2}}.items()
    }


def test_rows_are_the_test_accuracies_of_what_has_finished(tmp_path: Path) -> None:
    tuned = {"labels": 40, "pretrained": {"val": 0.0, "test": 0.9}, "scratch": {"val": 0.0, "test": 0.8}}
    instances = [
        finished(tmp_path, "pretrain", 0, {"images": 100}),
        finished(tmp_path, "evaluate", 0, evaluated(0.0)),
        finished(tmp_path, "evaluate", 1, evaluated(0.03125)),
        finished(tmp_path, "evaluate", 2, None),
        finished(tmp_path, "finetune", 0, tuned),
    ]
    found = rows(recipes.recipe(tmp_path, seeds=[0, 1, 2]), instances)
    assert found == [
        Row("evaluate", "kNN (k=5)", "random weights", (0.5, 0.53125), (0.1, 0.13125), "knn"),
        Row("evaluate", "linear probe", "random weights", (0.6, 0.63125), (0.2, 0.23125), "probe"),
        Row("finetune", "classify, 40 labels", "scratch", (0.9,), (0.8,), "accuracy"),
    ]


def test_nothing_finished_has_no_rows(tmp_path: Path) -> None:
    assert (
        rows(
            recipes.recipe(tmp_path), [finished(tmp_path, "evaluate", 0, None), finished(tmp_path, "finetune", 0, None)]
        )
        == []
    )


SAYS = {"stage": "finetune", "measure": "accuracy", "paper": 79.2, "against": 72.4, "source": "table 2"}


def test_the_papers_number_stands_beside_the_measured_one(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, expected=[SAYS])
    found = Row("finetune", "classify, 40 labels", "scratch", (0.7, 0.8), (0.6, 0.7), "accuracy")
    other = Row("evaluate", "linear probe", "random weights", (0.5, 0.5), (0.4, 0.4), "probe")
    console = Console(file=io.StringIO(), width=200)
    console.print(table(recipe, [found, other]))
    assert isinstance(console.file, io.StringIO)
    first, second = (
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if "±" in line
    )
    assert first[-2:] == ["79.2 (72.4)", "-4.20"]
    assert second[-2:] == ["", ""]
    told = facts(recipe, found)
    assert (told["paper"], told["paper_baseline"], told["source"]) == (79.2, 72.4, "table 2")
    assert told["above_paper"] == pytest.approx(75.0 - 79.2)
    assert "paper" not in facts(recipe, other)


def test_another_arm_is_another_number(tmp_path: Path) -> None:
    recipe = recipes.recipe(
        tmp_path, expected=[SAYS | {"arm": "he"}], stages__finetune__arms=["pretrained", "he", "scratch"]
    )
    assert "paper" not in facts(recipe, Row("finetune", "m", "scratch", (0.7,), (0.6,), "accuracy"))
    assert facts(recipe, Row("finetune", "m", "scratch", (0.7,), (0.6,), "accuracy", "he"))["paper"] == 79.2


OWN = {  # what a paper may have of a pretraining: by which method, and the keys that it needs
    "accuracy": ({"name": "clustering_locality"}, {"labelled_per_batch": 8}),
    "psnr": ({"name": "dae"}, {}),
    "consistency": ({"name": "super_and", "rounds": 2}, {}),
}


def with_own(tmp_path: Path, measure: str, paper: float) -> Recipe:
    method, keys = OWN[measure]
    changes = {f"stages__pretrain__{key}": value for key, value in ({"method": method} | keys).items()}
    return recipes.recipe(
        tmp_path, expected=[{"stage": "pretrain", "measure": measure, "paper": paper, "source": "x"}], **changes
    )


@pytest.mark.parametrize(
    ("measure", "mean", "paper"), [("accuracy", 50.0, 42.0), ("psnr", 22.5, 23.9), ("consistency", 20.0, 87.4)]
)
def test_numbers_of_a_pretraining_are_rows_where_the_paper_has_them(
    tmp_path: Path, measure: str, mean: float, paper: float
) -> None:
    """Its own classifier's accuracy, decibels of held-out images as they are, and the last value of what it logs."""
    instance = finished(tmp_path, "pretrain", 0, {"images": 100, "accuracy": {"test": 0.5}, "held_out": {"psnr": 22.5}})
    (instance.folder / METRICS).write_text(
        "".join(json.dumps({"step": k, "loss": 1.0, "consistency": 0.1 * k}) + "\n" for k in range(3))
    )
    recipe = with_own(tmp_path, measure, paper)
    (row,) = rows(recipe, [instance])
    assert (row.key, row.mean) == (measure, pytest.approx(mean))
    assert facts(recipe, row)["above_paper"] == pytest.approx(mean - paper)
    lines = shown([row], tmp_path, [0])
    assert any(f"{mean:.2f}" in line and (measure != "psnr" or "PSNR (dB), held-out images" in line) for line in lines)
    assert rows(recipes.recipe(tmp_path), [instance]) == []


@pytest.mark.parametrize("measure", OWN)
def test_numbers_that_are_not_there_are_no_rows(tmp_path: Path, measure: str) -> None:
    instance = finished(tmp_path, "pretrain", 0, {"images": 100, "accuracy": {}, "held_out": {}})
    (instance.folder / METRICS).write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert rows(with_own(tmp_path, measure, 1.0), [instance]) == []


def test_a_number_that_a_stage_does_not_measure_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"expected\.0\.measure: 'acuracy' is not measured by stages\.finetune; did you mean 'accuracy'\?",
    ):
        recipes.recipe(tmp_path, expected=[SAYS | {"measure": "acuracy"}])
    with pytest.raises(
        UserError, match=r"expected\.0\.measure: 'psnr' is not measured by stages\.pretrain; valid: nothing"
    ):
        recipes.recipe(tmp_path, expected=[SAYS | {"stage": "pretrain", "measure": "psnr"}])
    layers = {"stages__evaluate__layers": [0, -1]}
    assert recipes.recipe(tmp_path, expected=[SAYS | {"stage": "evaluate", "measure": "knn_layer0"}], **layers).expected
    with pytest.raises(
        UserError, match=r"'knn' is not measured by stages\.evaluate; valid: knn_layer-1, knn_layer0, probe"
    ):
        recipes.recipe(tmp_path, expected=[SAYS | {"stage": "evaluate", "measure": "knn"}], **layers)
