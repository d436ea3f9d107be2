import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.score_table import gain_metrics, make_score_table, score_facts
from firstlight.pipeline.stages.score_rows import ScoreRow, judge_rows, score_rows
from firstlight.pipeline.train.metrics import METRICS_FILE
from tests.support import recipes
from tests.support.stage_results import finished, with_own

# What every row of a training has besides its step.
LOGGED = {"of": 2, "time": 1000.0, "images_per_s": 10.0, "loss": 1.0}


def row(pretrained: list[float], baseline: list[float]) -> ScoreRow:
    its = ScoreRow("finetune", "classify, 40 labels", "scratch", tuple(pretrained), tuple(baseline))
    return judge_rows([its])[0]


def gains(*percent: float) -> ScoreRow:
    return row([0.5 + p / 100 for p in percent], [0.5] * len(percent))


def test_the_gain_is_paired_by_seed_and_in_percent() -> None:
    its = row([0.6, 0.8], [0.5, 0.75])
    np.testing.assert_allclose(its.gain, [10, 5])


def shown(found: list[ScoreRow], tmp_path: Path, seeds: list[int]) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(make_score_table(recipes.recipe(tmp_path, seeds=seeds), found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_table_has_means_deviations_and_the_interval_of_the_gain(tmp_path: Path, sign: int) -> None:
    a, b = np.array([0.61, 0.655, 0.63]), np.array([0.5, 0.52, 0.495])
    a, b = (a, b) if sign > 0 else (b, a)
    lines = shown([row(a.tolist(), b.tolist())], tmp_path, [0, 1, 2])
    gain = 100 * (a - b)
    cells = [f"{100 * v.mean():.2f} ± {100 * v.std(ddof=1):.2f}" for v in (a, b)]
    assert lines[0].strip() == "small: test scores (%), 3 seeds; [95 % interval of the gain]"
    line = next(line for line in lines if "classify" in line)
    found = [cell.strip() for cell in line.split("│")[1:-1]]
    low, high = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    expected = f"{gain.mean():+.2f} [{low:+.1f}, {high:+.1f}]"
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


def test_json_and_metrics_of_a_row_have_its_gain_interval_and_verdict(tmp_path: Path) -> None:
    its = row([0.61, 0.655, 0.63], [0.5, 0.52, 0.495])
    facts, numbers = score_facts(recipes.recipe(tmp_path), its), gain_metrics(its)
    assert its.verdict is not None
    assert facts["verdict"] == "helps"
    assert facts["interval"] == its.verdict.interval == (numbers["gain_low_percent"], numbers["gain_high_percent"])
    assert facts["p_value"] == numbers["gain_p_value"] < 0.05
    assert facts["gain"] == numbers["mean_gain_percent"] == pytest.approx(12.667, abs=1e-3)
    assert set(gain_metrics(gains(7.0))) == {"mean_gain_percent"}


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
        "".join(json.dumps({**LOGGED, "step": k, "consistency": 0.1 * k}) + "\n" for k in range(3))
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


@pytest.mark.parametrize("baseline", [(), (math.nan, math.nan, math.nan), (0.5, 0.4, 0.6)])
def test_images_that_give_no_score_have_no_number(tmp_path: Path, baseline: tuple[float, ...]) -> None:
    """Neither 0 nor 100, no verdict, nothing that JSON lacks, and no metric."""
    its = ScoreRow("segment", "mean iou, 0 of 2 classes", "scratch" if baseline else "", (math.nan,) * 3, baseline)
    (judged,) = judge_rows([its])
    assert not judged.is_scored
    text = "\n".join(shown([judged], tmp_path, [0, 1, 2]))
    assert "no score" in text
    assert "nan" not in text
    assert ("no verdict" in text) == bool(baseline)
    facts = score_facts(recipes.recipe(tmp_path), judged)
    assert json.loads(json.dumps(facts, allow_nan=False))["pretrained"] == [None, None, None]
    assert gain_metrics(judged) == {}
