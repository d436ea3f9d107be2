"""Recipes and searches of "Clustering and Locality Penalties": steps and passes along its axes, and clusters in use."""

import io
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from firstlight.pipeline.config.catalog import RECIPES_FOLDER
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.data.plan import SemiSupervisedPlan
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.page_parts import REPORT_FILE
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search.checks import load_checked_plan
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.stages.pretraining.job import build_job, draw_unlabelled_ids
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain.clustering_locality import ClusteringLocality
from firstlight.tasks.pretrain.method import TrainingInfo
from tests.support import recipes
from tests.support.batches import batch_of_images
from tests.support.paths import ROOT
from tests.support.recipe_runs import QUIET

PAPER = RECIPES_FOLDER / "clustering_locality"
SEARCHES = ROOT / "conf" / "search"
# Stages of figure 1, left, in the order of R/T.
RATIOS = ("ratio0_3", "ratio0_5", "ratio0_7", "ratio0_9")
# The sizes of the classes in the training split: 895 of ImageNet's have 1,300 images, the others at least 732.
CLASS_SIZES = {
    "imagenet_devkit": np.concatenate((np.full(895, 1300), np.linspace(732, 1299, 105).astype(int))),
    "cifar10": np.full(10, 5000),
}


@cache
def splits_of(name: str, max_train: int | None, val_fraction: float) -> Splits:
    """Draws the splits of a data set whose classes have the sizes of `CLASS_SIZES`."""
    classes = len(CLASS_SIZES[name])
    labels = np.repeat(np.arange(classes), CLASS_SIZES[name])
    images = len(labels)
    ids = np.sort(np.random.default_rng(0).choice(images, max_train or images, replace=False))
    order = ids[np.argsort(labels[ids], kind="stable")]
    counts = np.bincount(labels[ids], minlength=classes)
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    val = np.sort(order[place < np.repeat(np.round(val_fraction * counts), counts)])
    return Splits(np.setdiff1d(ids, val, assume_unique=True), val, ids[:0], labels)


def count_passes(recipe: Recipe, name: str) -> tuple[int, float, float]:
    """Returns the steps of a stage, and its passes over labelled and over other images."""
    stage, kind, data = recipe.stages[name], stage_kind(recipe.stages[name]), recipe.dataset
    assert isinstance(stage, Pretrain)
    assert data.val_fraction is not None
    splits = splits_of(data.name, data.max_train, data.val_fraction)
    images, batch = kind.count_epoch_images(stage, splits, 0) or (0, 1)
    labelled, part = kind.count_labelled_images(stage, splits, 0) or (0, 1)
    steps = stage.length.count_steps(images // batch)
    return steps, steps / (labelled // part), steps / (images // batch)


def open_recipe(name: str) -> Recipe:
    return load_recipe(PAPER / f"{name}.yaml", ("dataset.root=/data",))


def open_plan(name: str) -> SearchPlan:
    return load_checked_plan(SEARCHES / f"{name}.yaml", ("dataset.root=/data",))


def list_points(name: str) -> list[tuple[int, float, float]]:
    """Returns `count_passes` of every trial of a search over a grid, in the order of its key."""
    plan = open_plan(name)
    return [count_passes(plan.trial_recipe(values), "pretrain") for values in plan.search.grid_points()]


def stated_numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_steps_of_figure_1_left_are_equal_and_passes_are_as_stated() -> None:
    recipe = open_recipe("figure1_left")
    points = [count_passes(recipe, name) for name in RATIOS]
    assert [steps for steps, _, _ in points] == [15600] * 4
    text = (PAPER / "figure1_left.yaml").read_text()
    for name, (_, labelled, others) in zip(RATIOS, points, strict=True):
        (comment,) = re.findall(rf"^  {name}: .* # (.*)$", text, re.M)
        assert stated_numbers(comment) == [round(labelled), round(others)]
    labelled = [passes for _, passes, _ in points]
    assert np.allclose(labelled, np.array([0.3, 0.5, 0.7, 0.9]) * labelled[1] / 0.5, rtol=0.03), "proportional to R/T"


def test_steps_of_the_search_of_figure_1_left_are_equal_and_passes_are_as_stated() -> None:
    points = list_points("clustering_locality_figure1_left")
    assert [steps for steps, _, _ in points] == [15600] * 6
    description = open_plan("clustering_locality_figure1_left").search.description
    stated = stated_numbers(description.partition("Every trial has 15,600 steps:")[2])
    assert stated == [*(round(passes) for _, passes, _ in points), *(round(passes) for _, _, passes in points)]


def test_steps_and_labelled_passes_of_figure_1_right_are_equal() -> None:
    points = list_points("clustering_locality_figure1_right")
    assert {steps for steps, _, _ in points} == {15600}
    assert {round(labelled) for _, labelled, _ in points} == {220}
    description = open_plan("clustering_locality_figure1_right").search.description
    stated = stated_numbers(description.partition("Every trial has")[2])
    assert stated == [15600, 220, *(round(others) for _, _, others in points)]
    sizes = open_plan("clustering_locality_figure1_right").search.space["stages.pretrain.max_unlabelled"].grid
    assert sizes == (50_000, 100_000, 150_000, 200_000, 250_000)
    assert count_passes(open_recipe("figure1_right"), "pretrain") == points[1], "the recipe has 100,000 images"
    stated = stated_numbers(open_recipe("figure1_right").description.partition("with them the")[2])
    assert stated[:6] == [220, *(round(others) for _, _, others in points)]


def test_unlabelled_images_of_a_point_are_among_those_of_the_next_and_the_labelled_ones_are_fixed() -> None:
    """Section 3: 64,000 labelled images are fixed. Classes of few images have as many labelled ones as all others."""
    plan = open_plan("clustering_locality_figure1_right")
    trials: list[Any] = [plan.trial_recipe(values) for values in plan.search.grid_points()]
    assert all(trial.dataset == trials[0].dataset for trial in trials), "as are the held-out images"
    splits = splits_of(trials[0].dataset.name, trials[0].dataset.max_train, trials[0].dataset.val_fraction)
    stages = [trial.stages["pretrain"] for trial in trials]
    labelled = [splits.labelled_subset(stage, 0) for stage in stages]
    assert all(np.array_equal(ids, labelled[0]) for ids in labelled)
    assert (np.bincount(splits.labels[labelled[0]]) == 64).all()
    drawn = [draw_unlabelled_ids(splits, stage, labelled[0], 0) for stage in stages]
    assert [len(ids) for ids in drawn] == [50_000, 100_000, 150_000, 200_000, 250_000]
    assert all(np.isin(fewer, more).all() for fewer, more in pairwise(drawn))
    assert not np.isin(drawn[-1], labelled[0]).any()
    assert not np.array_equal(drawn[0], draw_unlabelled_ids(splits, stages[0], labelled[0], 1)), "the seed draws them"


def test_plan_has_the_labelled_and_the_chosen_other_images(tmp_path: Path, digits: Store) -> None:
    def plan_of(count: int | None) -> SemiSupervisedPlan:
        changes = {"labelled_per_batch": 20, "labels_per_class": 2, "max_unlabelled": count}
        stages = {f"stages__pretrain__{key}": value for key, value in changes.items()}
        recipe = recipes.recipe(tmp_path, stages__pretrain__method={"name": "clustering_locality"}, **stages)
        context = StageContext.create(recipe, digits, on_ray=False)
        stage: Any = recipe.stages["pretrain"]
        plan = build_job(context, stage, StageInstance("pretrain", 3, "f", tmp_path)).plan
        assert isinstance(plan, SemiSupervisedPlan)
        images, batch = stage_kind(stage).count_epoch_images(stage, context.splits, 3) or (0, 0)
        assert (len(plan.rest.ids), plan.steps) == (images, images // batch)
        return plan

    everything, some = plan_of(None), plan_of(25)
    assert np.array_equal(everything.labelled.ids, some.labelled.ids)
    assert (len(some.rest.ids), some.steps) == (25, 2)
    assert np.isin(some.rest.ids, everything.rest.ids).all()
    assert np.isin(some.epoch(0), np.concatenate((some.labelled.ids, some.rest.ids))).all()


@pytest.mark.parametrize(
    ("labelled", "wanted", "message"),
    [
        (
            20,
            1000,
            r"stages\.pretrain\.max_unlabelled: 1000 is more than the \d+ training images beside the 20 labelled",
        ),
        (32, 10, r"stages\.pretrain\.max_unlabelled: 10 is not valid with labelled_per_batch: 32: .*; valid: null$"),
        (20, 5, r"stages\.pretrain\.labelled_per_batch: 20 leaves 12 images of a batch to the 5 without a label"),
    ],
)
def test_impossible_number_of_unlabelled_images_is_refused(
    tmp_path: Path, labelled: int, wanted: int, message: str
) -> None:
    changes = {"labelled_per_batch": labelled, "labels_per_class": 2, "max_unlabelled": wanted}
    stages = {f"stages__pretrain__{key}": value for key, value in changes.items()}
    method = {"name": "clustering_locality"}
    with pytest.raises(UserError, match=message):
        run_recipe(recipes.recipe(tmp_path, stages__pretrain__method=method, **stages), QUIET, only="pretrain")


@pytest.mark.parametrize("name", ["figure1_left", "figure1_right", "section3_3", "section3_4", "section3_5"])
def test_learning_rate_falls_at_a_third_and_two_thirds_of_the_steps(name: str) -> None:
    stages = [stage for stage in open_recipe(name).stages.values() if isinstance(stage, Pretrain)]
    assert stages
    for stage in stages:
        assert stage.steps is not None
        assert stage.schedule is not None
        assert stage.schedule.interval == "step"
        assert stage.schedule.arguments()["milestones"] == [stage.steps // 3, 2 * stage.steps // 3]


def test_trials_of_the_cifar_search_have_equally_many_steps() -> None:
    plan, stage = open_plan("clustering_locality"), "clustering_locality_40"
    recipes_ = [plan.trial_recipe(values) for values in plan.corner_values()]
    points = [count_passes(recipe, stage) for recipe in recipes_]
    assert len({steps for steps, _, _ in points}) == 1
    labelled = [passes for _, passes, _ in points]
    per_epoch = [round(steps / others) for steps, _, others in points]
    stated = stated_numbers(plan.search.description.partition("Every trial has")[2])
    assert stated[0] == points[0][0]
    assert stated[-4:] == [round(min(labelled)), round(max(labelled)), min(per_epoch), max(per_epoch)]


def test_beta_is_swept_with_all_else_equal() -> None:
    stages: Any = open_recipe("section3_3").stages
    swept = [stage for name, stage in stages.items() if name.startswith("beta")]
    betas = [stage.method.beta for stage in swept]
    assert betas == sorted(set(betas))
    assert (betas[0], betas[-1]) == (0.0, 0.8)
    rest = [stage.model_dump(exclude={"method": {"beta"}}) for stage in swept]
    assert all(other == rest[0] for other in rest)
    assert rest[0]["labelled_per_batch"] / rest[0]["batch_size"] == 0.7
    for name, stage in stages.items():
        assert stage.steps * stage.batch_size == swept[0].steps * swept[0].batch_size, "as many images"
        assert stage.labelled_per_batch / stage.batch_size == 0.7, name
        assert stage.optimizer.lr / stage.batch_size == pytest.approx(0.5 / 1280)
    assert open_plan("clustering_locality_beta").search.space["stages.pretrain.method.beta"].grid == tuple(betas)


def test_starts_of_section_3_5_differ_in_the_labels_alone() -> None:
    stages: Any = open_recipe("section3_5").stages
    without, with_labels = stages["unsupervised"], stages["semi_supervised"]
    labels = {
        "method": {"supervised", "clusters"},
        "labelled_per_batch": ...,
        "labels_per_class": ...,
        "register_as": ...,
    }
    assert without.model_dump(exclude=labels) == with_labels.model_dump(exclude=labels)
    assert (without.method.supervised, with_labels.method.supervised) == (False, True)
    assert (without.labelled_per_batch, with_labels.labelled_per_batch) == (0, 896)
    for task in ("detection", "segmentation"):
        taken: Any = open_recipe(f"section3_5_{task}").stages
        assert [f"models:/{stage.register_as}@current" for stage in (without, with_labels)] == [
            taken["unsupervised"].encoder,
            taken["semi_supervised"].encoder,
        ]


def list_recipes_of_the_paper() -> list[str]:
    return sorted(file.stem for file in PAPER.glob("*.yaml"))


@pytest.mark.parametrize("name", list_recipes_of_the_paper())
def test_no_recipe_of_the_paper_warns_of_collapse(name: str) -> None:
    for stage_name, stage in open_recipe(name).stages.items():
        assert stage_kind(stage).list_warnings(stage_name, stage) == ()


def cluster_digits(seed: int, **options: Any) -> tuple[float, int]:
    """Clusters the digits without labels with a small convolutional network.

    Returns the entropy of the mean prediction, and the number of clusters of more than one image in a hundred.
    """
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images / 16.0).float()[:, None].expand(-1, 3, -1, -1)
    torch.manual_seed(seed)
    encoder = Encoder({"name": "convnet", "input": "gray", "norm": "batch", "width": 16, "depth": 2}, 8)
    info = TrainingInfo(len(images), 8, seed, 10)
    learner = ClusteringLocality(encoder, info, **{**options, "clusters": 10})
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100):
        chosen = torch.randperm(len(images), generator=generator)[:128]
        optimizer.zero_grad()
        learner(batch_of_images(images[chosen], ids=chosen))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        losses = learner.eval()(batch_of_images(images))
        of_clusters = torch.bincount(learner.embed(batch_of_images(images))[0].argmax(1), minlength=10)
    assert int(losses["clusters_used"]) == int((of_clusters > 0).sum())
    return float(losses["batch_entropy"]), int((of_clusters > len(images) // 100).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_unsupervised_stage_of_section_3_5_uses_several_clusters(seed: int) -> None:
    stage: Any = open_recipe("section3_5").stages["unsupervised"]
    entropy, clusters = cluster_digits(seed, **constructor_arguments(stage.method))
    assert clusters >= 4
    assert entropy > 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_beta_below_alpha_without_labels_makes_one_cluster(seed: int) -> None:
    """The method warns of such a beta."""
    options = {"alpha": 0.8, "beta": 0.1, "gamma": 0.01, "supervised": False}
    entropy, clusters = cluster_digits(seed, **options)
    assert clusters == 1
    assert entropy < 0.05
    assert ClusteringLocality.list_warnings(ClusteringLocality.complete_parameters(options))


@pytest.mark.usefixtures("undrawn_figures")
def test_run_with_alpha_above_beta_and_no_labels_warns_before_the_training(tmp_path: Path, digits: Store) -> None:
    """The length is in steps, and the report says so."""
    method = {"name": "clustering_locality", "supervised": False}
    length = {"stages__pretrain__epochs": None, "stages__pretrain__steps": 4}
    recipe = recipes.recipe(tmp_path, stages__pretrain__method=method, **length)
    console = Console(file=io.StringIO(), width=100)
    run_recipe(recipe, console, only="pretrain")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    warning = "stages.pretrain.method.beta: 0.1 is less than alpha: 0.8, and no label is learned from"
    (told,) = (number for number, line in enumerate(lines) if line.startswith(f"note {warning}"))
    assert told < lines.index("pretrain: started")
    page = (tmp_path / recipe.name / REPORT_FILE).read_text()
    assert warning in page
    assert "4 steps of batches of 32" in page
    assert re.search(r"4 steps are 1\.3 passes over \d+ images", page)
