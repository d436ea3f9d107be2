import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.score_table import make_score_table, score_facts
from firstlight.pipeline.stages.score_rows import ScoreRow, score_rows
from firstlight.pipeline.train.metrics import METRICS_FILE
from tests.support import recipes
from tests.support.stage_results import finished, with_own


def row(pretrained: list[float], baseline: list[float]) -> ScoreRow:
    return ScoreRow("finetune", "classify, 40 labels", "scratch", tuple(pretrained), tuple(baseline))


def gains(*percent: float) -> ScoreRow:
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
def test_verdict_needs_agreeing_seeds_and_a_clear_gain(its: ScoreRow, verdict: str) -> None:
    assert its.verdict == verdict


@pytest.mark.parametrize("spread", [0.9, 1.1])
def test_the_mean_gain_must_be_above_twice_its_standard_error(spread: float) -> None:
    """Gains m - s, m, m + s have the standard error s / sqrt(3): the bound is s = m sqrt(3) / 2."""
    s = spread * 4 * np.sqrt(3) / 2
    assert gains(4 - s, 4, 4 + s).verdict == ("helps" if spread < 1 else "no clear difference")


def test_the_gain_is_paired_by_seed_and_in_percent() -> None:
    its = row([0.6, 0.8], [0.5, 0.75])
    np.testing.assert_allclose(its.gain, [10, 5])


def shown(found: list[ScoreRow], tmp_path: Path, seeds: list[int]) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(make_score_table(recipes.recipe(tmp_path, seeds=seeds), found))
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


def test_one_seed_has_no_standard_deviation(tmp_path: Path) -> None:
    lines = shown([gains(7.0)], tmp_path, [0])
    assert lines[0].strip() == "small: test scores (%), 1 seed"
    assert "±" not in "".join(lines)
    assert "57.00" in "".join(lines)
    assert "+7.00" in "".join(lines)
    assert "one seed: no verdict" in "".join(lines)


SAYS = {"stage": "finetune", "measure": "accuracy", "paper": 79.2, "against": 72.4, "source": "table 2"}


def test_the_papers_number_and_the_difference_from_it_are_in_the_table(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, expected=[SAYS])
    found = ScoreRow("finetune", "classify, 40 labels", "scratch", (0.7, 0.8), (0.6, 0.7), "accuracy")
    other = ScoreRow("evaluate", "linear probe", "random weights", (0.5, 0.5), (0.4, 0.4), "probe")
    console = Console(file=io.StringIO(), width=200)
    console.print(make_score_table(recipe, [found, other]))
    assert isinstance(console.file, io.StringIO)
    first, second = (
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if "±" in line
    )
    assert first[-2:] == ["79.2 (72.4)", "-4.20"]
    assert second[-2:] == ["", ""]
    told = score_facts(recipe, found)
    assert (told["paper"], told["paper_baseline"], told["source"]) == (79.2, 72.4, "table 2")
    assert told["above_paper"] == pytest.approx(75.0 - 79.2)
    assert "paper" not in score_facts(recipe, other)


def test_expected_number_may_be_of_another_arm(tmp_path: Path) -> None:
    recipe = recipes.recipe(
        tmp_path, expected=[SAYS | {"arm": "he"}], stages__finetune__arms=["pretrained", "he", "scratch"]
    )
    assert "paper" not in score_facts(recipe, ScoreRow("finetune", "m", "scratch", (0.7,), (0.6,), "accuracy"))
    assert score_facts(recipe, ScoreRow("finetune", "m", "scratch", (0.7,), (0.6,), "accuracy", "he"))["paper"] == 79.2


@pytest.mark.parametrize(
    ("measure", "mean", "paper"), [("accuracy", 50.0, 42.0), ("psnr", 22.5, 23.9), ("consistency", 20.0, 87.4)]
)
def test_numbers_of_a_pretraining_are_rows_where_the_paper_has_them(
    tmp_path: Path, measure: str, mean: float, paper: float
) -> None:
    """Its own classifier's accuracy, decibels of held-out images as they are, and the last value of what it logs."""
    instance = finished(tmp_path, "pretrain", 0, {"images": 100, "accuracy": {"test": 0.5}, "held_out": {"psnr": 22.5}})
    (instance.folder / METRICS_FILE).write_text(
        "".join(json.dumps({"step": k, "loss": 1.0, "consistency": 0.1 * k}) + "\n" for k in range(3))
    )
    recipe = with_own(tmp_path, measure, paper)
    (row,) = score_rows(recipe, [instance])
    assert (row.key, row.mean) == (measure, pytest.approx(mean))
    assert score_facts(recipe, row)["above_paper"] == pytest.approx(mean - paper)
    lines = shown([row], tmp_path, [0])
    assert any(f"{mean:.2f}" in line and (measure != "psnr" or "PSNR (dB), held-out images" in line) for line in lines)
    assert score_rows(recipes.recipe(tmp_path), [instance]) == []


def test_expected_number_that_is_not_measured_is_refused(tmp_path: Path) -> None:
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
