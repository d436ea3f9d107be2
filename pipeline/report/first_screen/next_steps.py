"""The next things to do after a run: rules on what was measured, each with the command that follows from it.

A rule is a function of the facts that returns a step, or None where it does not apply. The rules stand in the order of
their importance, and the first steps are told.
"""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstlight.pipeline.config.measures import GIVEN_ARM, is_pretrained_arm
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import STAGE_SECTIONS
from firstlight.pipeline.report.first_screen.blocks import NextStep
from firstlight.pipeline.report.first_screen.headline import continues_given_weights, name_compared_measure
from firstlight.pipeline.report.first_screen.training_trend import RisingTraining
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.verdicts import MIN_SEEDS, compute_intervals
from firstlight.pipeline.terminal import format_count

MAX_STEPS = 3
# More seeds than these are not worth their time.
MAX_ADVISED_SEEDS = 10
# The number of test images below which the user is warned of chance in a score.
MANY_TEST_IMAGES = 1000
# A pretraining from fresh weights on fewer images than these had no clear gain: docs/results.md, flowers.
SOME_HUNDRED_IMAGES = 1000
# The measures that are shares of the test images, so that their standard error is known.
SHARE_MEASURES = ("knn", "probe", "accuracy")
# The 97.5 % quantile of the normal distribution: the half width of a 95 % interval in standard errors.
NORMAL_QUANTILE = 1.96
# The overrides that add an evaluation; the second one compares with fewer neighbours, for few images.
EVALUATE_ALL, EVALUATE_FEW = "stages.evaluate={}", "stages.evaluate={knn_k: 20}"


@dataclass(frozen=True)
class MeasuredRun:
    """All that the rules read of a run. `encoders` and `models`: the folders of the first seed's, by stage; `run_ids`:
    the MLflow run of each of them.
    """

    recipe: Recipe
    rows: Sequence[ScoreRow]
    # The file that repeats the run.
    recipe_file: Path
    num_done: int
    num_wanted: int
    num_train: int
    num_test: int
    has_labels: bool
    encoders: Mapping[str, Path]
    run_ids: Mapping[str, str]
    # Stages during which the features have collapsed.
    collapsed: Sequence[str] = ()
    rising: Sequence[RisingTraining] = ()

    @property
    def tested(self) -> list[ScoreRow]:
        """The rows that were tested."""
        return [row for row in self.rows if row.verdict is not None and not row.verdict.reason]

    @property
    def has_pretraining(self) -> bool:
        return any(stage.makes_encoder for stage in self.recipe.stages.values())

    def list_missing_uses(self) -> dict[str, str]:
        """Returns what an encoder can be taken for by stages that the recipe does not have, by their kind."""
        kinds = {section.kind for section in self.recipe.stages.values()}
        uses = {kind: section.encoder_use for kind, section in STAGE_SECTIONS.items() if kind not in kinds}
        return {kind: use for kind, use in uses.items() if use}

    def repeat(self, *overrides: str) -> str:
        """Returns the command that runs the recipe with other values."""
        return shlex.join(["firstlight", "run", str(self.recipe_file), *overrides])


def choose_next_steps(run: MeasuredRun) -> list[NextStep]:
    """Returns the next steps that follow from what was measured, the most important first."""
    found = (rule(run) for rule in RULES)
    return [step for step in found if step is not None][:MAX_STEPS]


def _finish_run(run: MeasuredRun) -> NextStep | None:
    missing = run.num_wanted - run.num_done
    if not missing:
        return None
    return NextStep(
        f"{missing} of {format_count(run.num_wanted, 'part')} {'is' if missing == 1 else 'are'} missing. Run it again: "
        "what is finished is kept.",
        run.repeat(),
    )


def _score_something(run: MeasuredRun) -> NextStep | None:
    """Applies where all parts are done and no score stands beside a baseline."""
    if run.num_done < run.num_wanted or any(row.baseline for row in run.rows):
        return None
    if not run.recipe.score_test:
        return NextStep("Once the settings are chosen, score the test images.", run.repeat("score_test=true"))
    if not run.has_pretraining:
        return None
    if not run.has_labels:
        return NextStep(
            "The images have no labels, so no stage can score what was learned. A folder for each class, or a list "
            "with a column of labels, for some of them is enough to measure it."
        )
    again = "" if run.num_test else " Test images are then kept apart, so the pretraining runs again without them."
    return NextStep(
        f"Score the features beside those of random weights, by kNN and a linear probe.{again}",
        run.repeat(EVALUATE_ALL if run.num_train >= SOME_HUNDRED_IMAGES else EVALUATE_FEW),
    )


def _explain_collapse(run: MeasuredRun) -> NextStep | None:
    if not run.collapsed:
        return None
    return NextStep(
        f"The features have collapsed during {' and '.join(run.collapsed)} (see the warnings): a smaller learning rate "
        "or another method comes before more seeds or epochs."
    )


def _add_first_seeds(run: MeasuredRun) -> NextStep | None:
    """Applies where there are too few seeds for any verdict."""
    seeds = len(run.recipe.seeds)
    if seeds >= MIN_SEEDS or not any(row.baseline for row in run.rows):
        return None
    return NextStep(
        f"{format_count(seeds, 'seed')} cannot tell a gain from chance: a verdict needs {MIN_SEEDS}. "
        "What is finished is kept.",
        run.repeat(_list_seeds(run.recipe, MIN_SEEDS)),
    )


def _list_seeds(recipe: Recipe, count: int) -> str:
    """Returns the override for `count` seeds: those of the recipe, and the next numbers."""
    added = [seed for seed in range(count + len(recipe.seeds)) if seed not in recipe.seeds]
    seeds = [*recipe.seeds, *added][:count]
    return f"seeds=[{','.join(map(str, seeds))}]"


def _take_given_weights(run: MeasuredRun) -> NextStep | None:
    """Applies where pretraining is nowhere clearly better than the weights that it stands beside."""
    beside = [row for row in run.tested if row.continues_given]
    alone = [row for row in run.tested if row.arm == GIVEN_ARM and not run.has_pretraining]
    if beside and not _has_effect(beside, "helps"):
        subject = "Continuing" if continues_given_weights(run.recipe) else "The pretraining"
        reason = f"{subject} was not clearly better than the given weights in any measure"
    elif _has_effect(alone, "helps"):
        reason = "The given weights are worth more than fresh ones"
    else:
        return None
    wanted = run.list_missing_uses()
    return NextStep(
        f"{reason}: take them as they came, {_join_uses(wanted.values())}:"
        if wanted
        else f"{reason}: take them as they came.",
        "\n".join(run.repeat(f"stages.{kind}={{encoder: given}}") for kind in wanted),
    )


def _has_effect(rows: Sequence[ScoreRow], effect: str) -> bool:
    """Returns True if a row among tested ones has the effect."""
    return any(row.verdict is not None and row.verdict.effect == effect for row in rows)


def _join_uses(uses: Iterable[str]) -> str:
    """Returns the uses as a part of a sentence: `in Python, as vectors, or in other software`."""
    *others, last = uses
    return ", or ".join([", ".join(others), last] if others else [last])


def _use_encoder(run: MeasuredRun) -> NextStep | None:
    """Applies where pretraining clearly helps, also beside given weights if there are any."""
    beside = [row for row in run.tested if row.continues_given]
    asked = beside or [row for row in run.tested if is_pretrained_arm(row.arm)]
    helping = [row for row in asked if _has_effect([row], "helps")]
    if not helping:
        return None
    best = max(helping, key=lambda row: float(row.gain.mean()))
    source = run.recipe.encoder_source(best.stage)
    stage = source.stage if source is not None else None
    if stage is None or stage not in run.encoders:
        return None
    made = [name for name, section in run.recipe.stages.items() if section.makes_encoder]
    # The last encoder of a recipe is the only one with a name in it; others have one in MLflow.
    can_name = stage == made[-1] or stage in run.run_ids
    chosen = "{}" if stage == made[-1] else f"{{encoder: runs:/{run.run_ids.get(stage)}/encoder}}"
    wanted = run.list_missing_uses() if can_name else {}
    commands = [run.repeat(f"stages.{kind}={chosen}") for kind in wanted]
    return NextStep(
        f"Use the encoder of {stage}, {_join_uses(['in Python', *wanted.values()])}{':' if wanted else '.'}",
        "\n".join([f'fl.load_encoder("{run.encoders[stage]}")', *commands]),
    )


def _add_more_seeds(run: MeasuredRun) -> NextStep | None:
    """Applies where nothing is clear yet, and more seeds with the same mean and spread would make a row clear."""
    if _has_effect(run.tested, "helps") or _has_effect(run.tested, "hurts"):
        return None
    needed = {row: count for row in run.tested if (count := _count_needed_seeds(row, len(run.tested)))}
    if not needed:
        return None
    row = min(needed, key=lambda one: needed[one])
    return NextStep(
        f"If mean and spread stay as they are, {needed[row]} seeds would make {name_compared_measure(row, run.rows)} "
        "clear. Decide on the number once: seeds that are added until a verdict comes make wrong verdicts likelier.",
        run.repeat(_list_seeds(run.recipe, needed[row])),
    )


def _count_needed_seeds(row: ScoreRow, tested: int) -> int | None:
    """Returns the smallest number of seeds whose interval would leave out 0, None if MAX_ADVISED_SEEDS are too few."""
    mean, spread, seeds = float(row.gain.mean()), float(row.gain.std(ddof=1)), len(row.gain)
    for count in range(seeds + 1, MAX_ADVISED_SEEDS + 1):
        # Gains of that number with this mean and spread.
        drawn = np.resize([-1.0, 1.0], count)
        drawn = (drawn - drawn.mean()) / drawn.std(ddof=1)
        low, high, _ = compute_intervals(mean + spread * drawn, tested)
        if low > 0.0 or high < 0.0:
            return count
    return None


def _train_longer(run: MeasuredRun) -> NextStep | None:
    if not run.rising:
        return None
    one = max(run.rising, key=lambda rising: rising.last - rising.before)
    (before, after), unit = one.epochs, one.length.unit
    name, tracking = f"{run.recipe.name[:56]}-longer", run.recipe.tracking.uri
    location = f"storage={run.recipe.storage}" if tracking is None else f"tracking.uri={tracking}"
    return NextStep(
        f"The features of {one.stage} were still improving at its end: kNN on held-out images rose from "
        f"{100 * one.before:.1f} % after {before:g} epochs to {100 * one.last:.1f} % after {after:g}, in every seed. "
        "Train longer, and compare:",
        run.repeat(f"name={name}", f"stages.{one.stage}.{unit}={2 * one.length.count}")
        + "\n"
        + shlex.join(["firstlight", "compare", run.recipe.name, name, location]),
    )


def _read_advice(run: MeasuredRun) -> NextStep | None:
    """Applies where pretraining from fresh weights clearly helps in no measure."""
    asked = [row for row in run.tested if is_pretrained_arm(row.arm) and not row.continues_given]
    if not asked or _has_effect(asked, "helps"):
        return None
    if run.num_train < SOME_HUNDRED_IMAGES and not continues_given_weights(run.recipe):
        root = run.recipe.dataset.root if run.recipe.dataset.source == "folder" else None
        return NextStep(
            f"{run.num_train:,} images are few to learn from without labels. Start from weights of a network that "
            "exists (the recipe photos), or from more images.",
            "" if root is None else shlex.join(["firstlight", "run", "photos", f"dataset.root={root}"]),
        )
    return NextStep(
        "Without a gain here, another method may suit these images. The command firstlight recipes lists the methods "
        "for each kind of images, with their measurements.",
        "firstlight recipes",
    )


def _tell_chance_of_test_images(run: MeasuredRun) -> NextStep | None:
    """Applies where a score is a share of few test images: its interval over seeds does not cover other images."""
    shares = [row for row in run.rows if row.baseline and row.is_scored and row.key.startswith(SHARE_MEASURES)]
    if not shares or not 0 < run.num_test < MANY_TEST_IMAGES:
        return None
    row = max(shares, key=lambda one: float(one.gain.mean()))
    low, high = _bound_share(row.mean / row.scale, run.num_test)
    return NextStep(
        f"{run.num_test:,} test images are few: on others of the same kind, {name_compared_measure(row, run.rows)} "
        f"could be {100 * low:.0f} to {100 * high:.0f} % instead of {row.mean:.1f} %. More seeds do not narrow that, "
        "more test images do."
    )


def _bound_share(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of `count` images (Wilson's)."""
    square = NORMAL_QUANTILE**2 / count
    middle = (share + square / 2) / (1 + square)
    half = NORMAL_QUANTILE / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return middle - half, middle + half


RULES: tuple[Callable[[MeasuredRun], NextStep | None], ...] = (
    _finish_run,
    _score_something,
    _explain_collapse,
    _add_first_seeds,
    _take_given_weights,
    _use_encoder,
    _add_more_seeds,
    _train_longer,
    _read_advice,
    _tell_chance_of_test_images,
)
