"""The recipes of Super-AND: galleries, constants, starts and ablations, against the paper and its authors' code."""

from typing import Any

import pytest
import torch

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.optim import build_schedule
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.stages.pretraining.job import batch_requirements_of
from firstlight.pipeline.stages.sections.evaluate import Evaluate
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.sections.retrieve import Retrieve

NAMES = [recipe.name for recipe in list_recipes() if recipe.name.startswith("super_and/")]
RESNET18 = "super_and/table1_cifar10_resnet18"
# The constants of the authors' code (main.py), of CIFAR-10 and CIFAR-100, and of AND's (datasets/svhn.py), which alone
# has SVHN.
CONSTANTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052)),
}


def opened(name: str) -> Recipe:
    return load_recipe(RECIPES_FOLDER / f"{name}.yaml", ("dataset.root=/data",))


def pretrainings(name: str) -> dict[str, Any]:
    return {stage: kept for stage, kept in opened(name).stages.items() if isinstance(kept, Pretrain)}


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_number_stands_beside_knn_over_the_bank(name: str) -> None:
    """Section 4.1, and the authors' code. The row of the embedded training images is in the table too."""
    recipe = opened(name)
    evaluated = {stage: kept for stage, kept in recipe.stages.items() if isinstance(kept, Evaluate)}
    assert evaluated
    for stage in evaluated.values():
        assert (stage.features, stage.knn_k, stage.knn_temperature, stage.knn_bank) == ("head", 200, 0.1, True)
        assert [m.label for m in stage.measures][:2] == ["kNN (k=200, memory bank)", "kNN (k=200, head)"]
    rows = [row for row in recipe.expected if row.stage in evaluated]
    assert all(row.measure == "knn_bank" for row in rows)
    assert len(rows) == (0 if "figure5" in name else len(evaluated))


@pytest.mark.parametrize("name", [name for name in NAMES if opened(name).dataset.name in CONSTANTS])
def test_inputs_have_the_constants_of_the_authors_code(name: str) -> None:
    recipe = opened(name)
    encoder = recipe.network_spec
    assert (tuple(encoder["mean"]), tuple(encoder["std"])) == CONSTANTS[recipe.dataset.name]


@pytest.mark.parametrize("name", ["super_and/figure5", "super_and/figure5_baselines"])
def test_gallery_of_figure_5_is_labelled(name: str) -> None:
    """An image without a label has no frame, red or not."""
    (stage,) = (stage for stage in opened(name).stages.values() if isinstance(stage, Retrieve))
    assert (stage.gallery, stage.labelled_gallery, stage.precision_at) == ("train", True, (1, 5))


@pytest.mark.parametrize(
    ("name", "variant", "initial", "classes", "first_view", "milestones"),
    [
        (RESNET18, "reference", "multiple", "others", "augmented", [120, 160]),
        (f"{RESNET18}_random", "reference", "random", "others", "augmented", [120, 160]),
        (f"{RESNET18}_first_commit", "reference", "multiple", "all", "augmented", [120, 160]),
        (f"{RESNET18}_paper", "paper", "random", "others", "plain", [80, 120, 160]),
    ],
)
def test_readings_of_table_1_differ_in_what_they_say(
    name: str, variant: str, initial: str, classes: str, first_view: str, milestones: list[int]
) -> None:
    recipe, base = opened(name), opened(RESNET18)
    stage: Any = recipe.stages["pretrain"]
    method = stage.method
    assert (method.variant, method.initial, method.ue_classes) == (variant, initial, classes)
    assert (stage.first_view, method.ue_sign, method.views) == (first_view, "attract", 2)
    assert list(stage.schedule.model_dump()["milestones"]) == milestones
    other: Any = base.stages["pretrain"]
    assert stage.optimizer == other.optimizer
    assert (stage.augment, stage.epochs, stage.batch_size) == (other.augment, other.epochs, other.batch_size)
    assert (recipe.encoder, recipe.dataset, recipe.stages["evaluate"]) == (
        base.encoder,
        base.dataset,
        base.stages["evaluate"],
    )
    assert "table 1" in recipe.description.lower() or "log" in recipe.description


AUGMENTATIONS = [
    {"op": "random_resized_crop", "scale": (0.2, 1.0)},
    {"op": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4},
    {"op": "random_grayscale", "p": 0.2},
    {"op": "horizontal_flip", "p": 0.5},
]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in pretrainings(name)])
def test_trainings_have_the_settings_of_section_4_1(name: str, key: str) -> None:
    """Digits are not mirrored (section 4.1), and images of AND and Instance neither (AND's code, configs/base.yaml)."""
    stage = pretrainings(name)[key]
    method, optimizer = stage.method, stage.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.decay_all) == ("SGD", 0.03, True)
    assert optimizer.arguments() == {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    assert (stage.schedule.name, stage.schedule.interval, stage.schedule.period) == ("MultiStepLR", "epoch", 200)
    assert stage.schedule.arguments()["gamma"] == 0.1
    assert (stage.batch_size, stage.epochs) == (128, 200 * method.rounds)
    assert method.rounds == (5 if method.neighbours else 1)
    assert (method.dim, method.momentum, method.temperature, method.aug_temperature) == (128, 0.5, 0.1, 0.1)
    assert (method.ue_step, method.ue_period) == (0.2, 80)
    mirrored = "svhn" not in name and "baselines" not in name
    ops = [op.model_dump() for op in stage.augment]
    wanted = AUGMENTATIONS if mirrored else AUGMENTATIONS[:-1]
    assert [{field: op[field] for field in given} for op, given in zip(ops, wanted, strict=True)] == wanted


def test_learning_rate_of_a_round_is_that_of_the_code_or_of_the_paper() -> None:
    """The code's 0.03 * 0.1 ** ((epoch - 80) // 40) from 80 on; the paper drops at 80, too. Rounds begin again."""
    for name, first in ((RESNET18, 120), (f"{RESNET18}_paper", 80)):
        stage = pretrainings(name)["pretrain"]
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=stage.optimizer.lr)
        schedule, rates = build_schedule(stage.schedule, optimizer, stage.epochs), []
        for _ in range(stage.epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        drops = [first, *range(120, 200, 40)]
        one_round = [0.03 * 0.1 ** len({drop for drop in drops if drop <= epoch}) for epoch in range(200)]
        assert rates == pytest.approx(one_round * 5)


def test_ablations_of_table_4_leave_out_one_thing_each() -> None:
    stages = pretrainings("super_and/table4")
    full = stages["full"].method.model_dump()
    for name, loss in (("without_ue", "ue"), ("without_aug", "aug")):
        ablated = stages[name].method.model_dump()
        assert {key for key in full if ablated[key] != full[key]} == {loss}
        assert batch_requirements_of(stages[name]).views == 2


@pytest.mark.parametrize("name", [name for name in NAMES if "baselines" in name])
def test_baselines_have_one_view_as_in_their_code(name: str) -> None:
    stages = pretrainings(name)
    assert list(stages) == ["instance", "and"]
    for stage in stages.values():
        assert (stage.method.aug, stage.method.ue, batch_requirements_of(stage).views) == (False, False, 1)
