"""The first screen of a run's report, from its results: the headline, the chart of gains, and what to do next."""

from collections.abc import Sequence
from pathlib import Path

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.first_screen.blocks import GainChart, NextStep, NextSteps
from firstlight.pipeline.report.first_screen.gain_chart import draw_gain_bar, place_bars
from firstlight.pipeline.report.first_screen.headline import EFFECT_TONES
from firstlight.pipeline.report.first_screen.next_steps import MeasuredRun, choose_next_steps
from firstlight.pipeline.report.first_screen.training_trend import find_rising_trainings
from firstlight.pipeline.report.html_page import strip_credentials
from firstlight.pipeline.report.scores.arm_scores import describe_comparison, has_arm_columns
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.verdicts import MIN_SEEDS, TABLE_LEVEL
from firstlight.pipeline.terminal import format_count
from firstlight.pipeline.tracking.run_file import read_run_id
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics_rows

# The beginning of the note that a training writes when its features collapse.
COLLAPSE_NOTE = "features have collapsed"


def draw_gains(rows: Sequence[ScoreRow], num_test: int) -> GainChart | None:
    """Returns the chart of the gains of all rows with a baseline, None if there is none."""
    compared = [row for row in rows if row.verdict is not None and row.is_scored]
    with_arms = has_arm_columns(rows)
    bars = []
    for row in compared:
        assert row.verdict is not None
        against = describe_comparison(row) if with_arms else f"against {row.against}"
        tone = EFFECT_TONES.get(row.verdict.text, "unsure")
        name = row.label or row.measure if with_arms else row.measure
        bars.append(draw_gain_bar(name, f"{row.stage}, {against}", row.gain, row.verdict, (row.verdict.text, tone)))
    seeds = max((len(row.pretrained) for row in compared), default=0)
    images = f"on {format_count(num_test, 'test image')}" if num_test else "on test images"
    dots = "one seed" if seeds == 1 else "large dots: means, small ones: seeds"
    interval = f"{100 * (1 - TABLE_LEVEL):g} % intervals that hold for all rows together"
    shown = f"; bars: {interval}" if seeds >= MIN_SEEDS else ""
    return place_bars(f"Gain in points {images}; {dots}{shown}.", bars)


def list_next_steps(
    context: StageContext, rows: Sequence[ScoreRow], instances: Sequence[StageInstance], recipe_file: Path
) -> NextSteps | None:
    """Returns what to do next, None if nothing follows from what was measured."""
    recipe, splits = context.recipe, context.splits
    finished = [instance for instance in instances if instance.result is not None]
    first = _find_first_encoders(recipe, finished)
    run = MeasuredRun(
        recipe,
        rows,
        recipe_file,
        num_done=len(finished),
        num_wanted=len(recipe.stages) * len(recipe.seeds),
        num_train=len(splits.train),
        num_test=len(splits.test),
        has_labels=bool(context.store.classes),
        encoders={stage: instance.folder / "encoder" for stage, instance in first.items()},
        run_ids={stage: run_id for stage, one in first.items() if (run_id := read_run_id(one.folder))},
        collapsed=_list_collapsed(finished),
        rising=find_rising_trainings(recipe, finished, len(splits.val)),
    )
    steps = [NextStep(strip_credentials(step.text), strip_credentials(step.command)) for step in choose_next_steps(run)]
    return NextSteps(steps, str(Path.cwd())) if steps else None


def _find_first_encoders(recipe: Recipe, finished: Sequence[StageInstance]) -> dict[str, StageInstance]:
    """Returns the first finished seed of each stage that makes an encoder."""
    found: dict[str, StageInstance] = {}
    for instance in finished:
        if recipe.stages[instance.stage].makes_encoder:
            found.setdefault(instance.stage, instance)
    return found


def _list_collapsed(finished: Sequence[StageInstance]) -> list[str]:
    """Returns the stages during which the features of a seed have collapsed."""
    noted = [
        instance.stage
        for instance in finished
        if any(COLLAPSE_NOTE in str(row.get("note", "")) for row in read_metrics_rows(instance.folder / METRICS_FILE))
    ]
    return list(dict.fromkeys(noted))
