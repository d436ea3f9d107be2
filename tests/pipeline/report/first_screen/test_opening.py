"""The first screen is made from what a run has stored."""

import json
from pathlib import Path

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.first_screen.opening import draw_gains, list_next_steps
from firstlight.pipeline.stages.score_rows import score_rows
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE
from tests.support import recipes
from tests.support.judged_rows import ALIKE, HIGH, compared, judged, three_arms
from tests.support.stage_results import evaluated, finished


def test_chart_names_what_each_gain_is_over() -> None:
    chart = draw_gains(judged(compared(HIGH), compared(ALIKE, label="linear probe")), 60)
    assert chart is not None
    assert [(bar.measure, bar.remark, bar.verdict, bar.tone) for bar in chart.bars] == [
        ("kNN (k=20)", "evaluate, against random weights", "helps", "good"),
        ("linear probe", "evaluate, against random weights", "no clear difference", "unsure"),
    ]
    assert chart.caption == (
        "Gain in points on 60 test images; large dots: means, small ones: seeds; bars: 95 % intervals that hold for "
        "all rows together."
    )


def test_chart_of_three_arms_names_both_of_each_comparison() -> None:
    chart = draw_gains(three_arms((0.81, 0.80, 0.82)), 60)
    assert chart is not None
    assert [bar.remark for bar in chart.bars] == [
        f"evaluate, {one}" for one in ("pretrained against given", "pretrained against random", "given against random")
    ]


def test_chart_of_one_seed_has_no_intervals_and_no_chart_is_of_nothing() -> None:
    chart = draw_gains(judged(compared([0.5], [0.4])), 1)
    assert chart is not None
    assert chart.caption == "Gain in points on 1 test image; one seed."
    assert chart.bars[0].low is None
    assert draw_gains([], 60) is None
    assert draw_gains(judged(compared([float("nan")], [0.4])), 60) is None


def test_steps_are_those_of_the_stored_results(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path)
    context = StageContext.create(recipe, digits, on_ray=False)
    trained, scored = finished(tmp_path, "pretrain", 0, {}), finished(tmp_path, "evaluate", 0, evaluated(0.1))
    unfinished = finished(tmp_path, "finetune", 0, None)
    note = {"note": "features have collapsed: rank 1.2; different images have nearly the same features"}
    (trained.folder / METRICS_FILE).write_text(json.dumps(note) + "\n")
    rows, known = score_rows(recipe, [trained, scored]), [trained, scored, unfinished]
    found = list_next_steps(context, rows, known, tmp_path / "recipe.yaml")
    assert found is not None
    assert found.folder == str(Path.cwd())
    missing, collapse, seeds = found.steps
    assert missing.text.startswith("1 of 3 parts is missing")
    assert "collapsed during pretrain (see the warnings)" in collapse.text
    assert seeds.command == f"firstlight run {tmp_path / 'recipe.yaml'} 'seeds=[0,1,2]'"


def test_helping_encoder_is_that_of_the_first_seed(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[0, 1, 2])
    context = StageContext.create(recipe, digits, on_ray=False)
    trained = [finished(tmp_path, "pretrain", seed, {}) for seed in (0, 1, 2)]
    scored = [finished(tmp_path, "evaluate", seed, evaluated(seed / 100)) for seed in (0, 1, 2)]
    tuned = [finished(tmp_path, "finetune", seed, {}) for seed in (0, 1, 2)]
    found = list_next_steps(context, judged(compared(HIGH)), [*trained, *scored, *tuned], tmp_path / "recipe.yaml")
    assert found is not None
    assert f'fl.load_encoder("{trained[0].folder / "encoder"}")' in found.steps[0].command


def test_block_of_next_steps_is_left_out_if_there_are_none(tmp_path: Path, digits: Store) -> None:
    raw = {**recipes.RECIPE["encoder"], "weights": "/w.safetensors"}
    stages = {"embed": {"kind": "embed"}}
    recipe = recipes.recipe(tmp_path, encoder=raw, stages=stages)
    context = StageContext.create(recipe, digits, on_ray=False)
    assert list_next_steps(context, [], [finished(tmp_path, "embed", 0, {})], tmp_path / "recipe.yaml") is None
