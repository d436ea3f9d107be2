import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.score_table import (
    gain_metrics,
    list_score_lines,
    make_score_table,
    make_score_tables,
    score_facts,
    table_facts,
)
from firstlight.pipeline.stages.score_rows import ScoreRow, judge_rows, score_rows
from firstlight.pipeline.train.metrics import METRICS_FILE
from tests.support import recipes
from tests.support.stage_results import evaluated, finish_arms, finished, with_given, with_own

# The metrics in every row of a training besides its step.
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


def print_tables(recipe: Recipe, rows: list[ScoreRow], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(make_score_tables(recipe, rows))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def read_cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def three_arm_rows(tmp_path: Path) -> list[ScoreRow]:
    instances = [*finish_arms(tmp_path, "evaluate"), *finish_arms(tmp_path, "finetune")]
    return score_rows(with_given(tmp_path), instances)


@pytest.mark.parametrize("width", [80, 140])
def test_three_arms_have_a_table_of_scores_and_one_of_comparisons(tmp_path: Path, width: int) -> None:
    rows = three_arm_rows(tmp_path)
    lines = print_tables(with_given(tmp_path), rows, width)
    assert max(map(len, lines)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)
    title = lines.index("comparisons; [95 % interval of the gain]")
    assert lines[0] == "small: test scores (%), 3 seeds"
    scores, compared = read_cells(lines[:title]), read_cells(lines[title:])
    heads = " ".join(line for line in lines[:title] if line.startswith("┃")).replace("┃", " ").split()
    assert heads == ["random", "or", "stage", "measure", "pretrained", "given", "scratch"]
    spreads = ["83.00 ± 1.00", "81.00 ± 1.00", "41.00 ± 1.00"]
    assert scores == [
        ["evaluate", "kNN (k=5)", *spreads],
        ["evaluate", "linear probe", *spreads],
        ["finetune", "classify, 40 labels", *spreads],
    ]
    assert [line[0] for line in compared[:5]] == [
        "evaluate: kNN (k=5)",
        "pretrained against given",
        "pretrained against random",
        "given against random",
        "evaluate: linear probe",
    ]
    own = [line for line in compared if line[1]]
    assert [line[2] for line in own] == [str(row.verdict) for row in rows]
    for line, row in zip(own, rows, strict=True):
        assert row.verdict is not None
        assert row.verdict.interval is not None
        low, high = row.verdict.interval
        assert line[1] == f"{row.gain.mean():+.2f} [{low:+.1f}, {high:+.1f}]"


def test_weights_without_a_pretraining_have_one_table(tmp_path: Path) -> None:
    recipe = with_given(tmp_path, stages={"finetune": recipes.RECIPE["stages"]["finetune"]})
    rows = score_rows(recipe, finish_arms(tmp_path, "finetune"))
    lines = print_tables(recipe, rows, 140)
    heads = next(line for line in lines if line.startswith("┃"))
    assert heads.replace("┃", " ").split() == ["stage", "measure", "given", "without", "baseline", "gain", "verdict"]
    ((stage, measure, given, against, fresh, _, verdict),) = read_cells(lines)
    assert (stage, measure, given) == ("finetune", "classify, 40 labels", "81.00 ± 1.00")
    assert (against, fresh, verdict) == ("scratch", "41.00 ± 1.00", "helps")


def test_two_arms_print_as_one_table(tmp_path: Path) -> None:
    rows, recipe = [gains(7.0, 8.0, 6.5)], recipes.recipe(tmp_path, seeds=[0, 1, 2])
    assert print_tables(recipe, rows, 200) == [line.rstrip() for line in shown(rows, tmp_path, [0, 1, 2])]


def test_paper_numbers_stand_once_in_a_table_of_comparisons(tmp_path: Path) -> None:
    """With the row against the baseline of the paper, fresh weights."""
    expected = [SAYS, SAYS | {"arm": "given", "paper": 75.5, "against": None}]
    recipe = with_given(tmp_path, expected=expected)
    rows = score_rows(recipe, finish_arms(tmp_path, "finetune"))
    lines = print_tables(recipe, rows, 140)
    cells = {
        line[0]: line[2:4] for line in read_cells(lines[lines.index("comparisons; [95 % interval of the gain]") :])
    }
    assert cells["pretrained against given"] == ["", ""]
    assert cells["pretrained against scratch"] == ["79.2 (72.4)", "+3.80"]
    assert cells["given against scratch"] == ["75.5", "+5.50"]


def test_number_without_a_baseline_is_a_score_and_no_comparison(tmp_path: Path) -> None:
    own = ScoreRow("pretrain", "own classifier", "", (0.5, 0.6, 0.7), (), "accuracy", label="own classifier")
    lines = print_tables(with_given(tmp_path), [own, *three_arm_rows(tmp_path)], 140)
    title = lines.index("comparisons; [95 % interval of the gain]")
    assert read_cells(lines[:title])[0] == ["pretrain", "own classifier", "60.00 ± 10.00", "", ""]
    assert not any("own classifier" in line for line in lines[title:])


def test_scores_of_three_arms_are_one_line(tmp_path: Path) -> None:
    spreads = "83.00 ± 1.00, given weights 81.00 ± 1.00"
    assert list_score_lines(three_arm_rows(tmp_path)) == [
        f"kNN (k=5): {spreads}, random weights 41.00 ± 1.00",
        f"linear probe: {spreads}, random weights 41.00 ± 1.00",
        f"classify, 40 labels: {spreads}, scratch 41.00 ± 1.00",
    ]
    two = score_rows(recipes.recipe(tmp_path), [finished(tmp_path, "evaluate", 9, evaluated(0.0))])
    assert list_score_lines(two) == [
        "kNN (k=5): 50.00, random weights 10.00",
        "linear probe: 60.00, random weights 20.00",
    ]


def test_rows_with_given_weights_name_their_arms_in_json(tmp_path: Path) -> None:
    rows = three_arm_rows(tmp_path)
    facts = table_facts(with_given(tmp_path), rows)
    assert [(one["arm"], one["baseline_arm"], one["label"]) for one in facts[:3]] == [
        ("pretrained", "given", "kNN (k=5)"),
        ("pretrained", "random", "kNN (k=5)"),
        ("given", "random", "kNN (k=5)"),
    ]
    assert len({one["measure"] for one in facts}) == len(facts)
    two = score_rows(recipes.recipe(tmp_path), [finished(tmp_path, "evaluate", 9, evaluated(0.0))])
    recipe = recipes.recipe(tmp_path)
    assert table_facts(recipe, two) == [score_facts(recipe, row) for row in two]
    assert not any("arm" in one for one in table_facts(recipe, two)), "as it always was"
