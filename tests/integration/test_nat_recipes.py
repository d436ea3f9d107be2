"""The recipes of Noise As Targets: input and optimisation of the authors' code, and figure 4 and table 4 are whole."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.optim import build_optimizer, build_schedule
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.nn.encoders import Encoder
from tests.support.paths import WITHOUT_ROOT


def opened(name: str) -> Recipe:
    changes = () if name in WITHOUT_ROOT else ("dataset.root=/data",)
    return load_recipe(RECIPES_FOLDER / f"{name}.yaml", changes)


def is_nat(recipe: Recipe) -> bool:
    return any(isinstance(stage, Pretrain) and stage.method.name == "nat" for stage in recipe.stages.values())


SOBEL_RECIPES = [
    entry.name
    for entry in list_recipes()
    if (entry.name.startswith("nat/") or is_nat(opened(entry.name)))
    and opened(entry.name).network_spec["input"] == "sobel"
]


def main_lua_gradients(image: np.ndarray) -> np.ndarray:
    """main.lua's frozen convolution of a (3, h, w) image, by loops: (2, h, w).

    Every channel has a third of each gradient, and outside of the image is 0.
    """
    dx = [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]
    dy = [[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]]
    _, h, w = image.shape
    out = np.zeros((2, h, w))
    for number, kernel in enumerate((dx, dy)):
        for i in range(h):
            for j in range(w):
                for channel in range(3):
                    for a in range(3):
                        for b in range(3):
                            y, x = i + a - 1, j + b - 1
                            if 0 <= y < h and 0 <= x < w:
                                out[number, i, j] += kernel[a][b] / 3.0 * image[channel, y, x]
    return out


def test_all_recipes_of_the_paper_with_gradients_are_compared() -> None:
    paper = {f"nat/{name}" for name in ("table2_sobel", "table3", "table4", "table4_detection", "figure2_left")}
    paper |= {f"nat/{name}" for name in ("figure2_right", "figure4", "section4_1", "cifar10")}
    assert paper == {name for name in SOBEL_RECIPES if "/" in name}
    assert {"cifar10_nat_small", "folder_nat"} <= set(SOBEL_RECIPES)


@pytest.mark.parametrize("name", SOBEL_RECIPES)
def test_input_is_that_of_the_authors_code(name: str) -> None:
    recipe = opened(name)
    spec = recipe.network_spec
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = Encoder(spec, recipe.dataset.image_size).input.double()
    one = image.numpy()[0]
    # Two small recipes, of no paper, normalise by the data set.
    normalised = (
        (one - one.mean()) / one.std(ddof=1)
        if spec["normalize"] == "image"
        else (one - made.mean[0].numpy()) / made.std[0].numpy()
    )
    np.testing.assert_allclose(made(image)[0].numpy(), main_lua_gradients(normalised), rtol=0, atol=1e-5)
    assert spec["normalize"] == "image" or "/" not in name


def list_transfers() -> list[tuple[str, str]]:
    """Returns recipe and stage of each MLP on frozen convolutions, on ImageNet or CIFAR-10."""
    names = ("table3", "figure2_left", "figure2_right", "section4_1", "cifar10")
    recipes = [(f"nat/{name}", opened(f"nat/{name}")) for name in names]
    return [(name, stage) for name, one in recipes for stage, kept in one.stages.items() if isinstance(kept, Finetune)]


@pytest.mark.parametrize(("name", "stage"), list_transfers())
def test_mlp_on_frozen_convolutions_is_optimised_as_in_test_lua(name: str, stage: str) -> None:
    """Its rate is 0.1 / (1 + 0.3 (e - 20)) from epoch 20 on; optimutil.lua decays no bias and no normalisation."""
    recipe = load_recipe(RECIPES_FOLDER / f"{name}.yaml", ("dataset.root=/data",), smoke=True)
    trial, whole = recipe.stages[stage], opened(name).stages[stage]
    assert isinstance(trial, Finetune)
    assert isinstance(whole, Finetune)
    assert (whole.epochs, whole.batch_size, whole.learning_rates, whole.labels_per_class) == (100, 256, (), None)
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    task = TASKS[trial.task.name](encoder, 10, **constructor_arguments(trial.task))
    optimizer = build_optimizer(whole.optimizer, task.parameter_groups(), 0.1)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    weights = {id(layer.weight) for layer in task.modules() if isinstance(layer, nn.Linear)}
    assert decayed.keys() == {id(p) for p in task.head.parameters()}, "the convolutions are frozen"
    # The code multiplies weights by 1 - 1e-8 in each step; here it is the rate times this.
    assert {key for key, decay in decayed.items() if decay} == weights
    assert {decay for decay in decayed.values() if decay} == {1e-8 / 0.1}
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["dampening"], group["nesterov"]) == (0.1, 0.9, 0.9, False)
    assert whole.schedule is not None
    assert whole.schedule.interval == "epoch"
    schedule, rates = build_schedule(whole.schedule, optimizer, 100), []
    for _ in range(100):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1 if e < 20 else 0.1 / (1 + 0.3 * (e - 20)) for e in range(100)])


PRETRAININGS = ("table3", "figure2_left", "figure2_right", "figure4", "section4_1", "cifar10")


@pytest.mark.parametrize("name", PRETRAININGS)
def test_pretraining_has_the_step_of_main_lua(name: str) -> None:
    """There 0.01 on the sum of 256 squared distances, without momentum and decay; here eq. 2, 1/512 of that sum."""
    stages = [stage for stage in opened(f"nat/{name}").stages.values() if isinstance(stage, Pretrain)]
    assert stages
    for stage in stages:
        method: Any = stage.method
        assert (stage.batch_size, stage.optimizer.lr, stage.optimizer.arguments()) == (256, 0.01 * 2 * 256, {})
        assert (stage.optimizer.name, method.reduction, method.solver, method.assign) == (
            *("SGD", "paper", "exact", "global"),
        )
        assert (method.hidden, method.dropout, method.pool) == ((4096, 4096), 0.5, "flatten")


def test_curves_and_ablation_differ_from_table_3_in_one_setting() -> None:
    base: Any = opened("nat/table3").stages["pretrain"].model_copy(update={"register_as": None})
    assert (base.method.dim, base.method.permutation_period, base.epochs) == (2048, 3, 100)
    for name, key in (("figure2_left", "permutation_period"), ("section4_1", "dim")):
        found = []
        for stage in opened(f"nat/{name}").stages.values():
            if isinstance(stage, Pretrain):
                found.append(getattr(stage.method, key))
                changes: dict[str, Any] = {key: getattr(base.method, key), "targets": "sphere"}
                assert stage == base.model_copy(update={"method": stage.method}), name
                assert stage.method.model_copy(update=changes) == base.method, name
        assert found == {"figure2_left": [1, 2, 3, 5, 10, 20], "section4_1": [1000, 10_000, 100_000]}[name]
    epochs = [stage for stage in opened("nat/figure2_right").stages.values() if isinstance(stage, Pretrain)]
    assert [stage.epochs for stage in epochs] == [20, 40, 60, 80, 100, 120]
    assert all(stage.model_copy(update={"epochs": 100}) == base for stage in epochs)


def test_figure_4_has_the_trainings_of_tables_2_and_3() -> None:
    figure, supervised, nat = opened("nat/figure4"), opened("nat/table2_sobel"), opened("nat/table3")
    assert figure.encoder == supervised.encoder == nat.encoder
    assert figure.dataset == supervised.dataset == nat.dataset
    assert figure.stages["supervised"] == supervised.stages["supervised"]
    assert figure.stages["pretrain"] == nat.stages["pretrain"].model_copy(update={"register_as": None})


@pytest.mark.parametrize("kind", ["", "_detection"])
def test_row_of_imagenet_labels_has_the_protocol_of_the_row_of_nat(kind: str) -> None:
    labels, nat = opened(f"nat/table4_labels{kind}"), opened(f"nat/table4{kind}")
    assert labels.dataset == nat.dataset
    assert list(labels.stages) == list(nat.stages)
    for name, stage in nat.stages.items():
        assert labels.stages[name] == stage.model_copy(update={"encoder": "models:/imagenet-labels@current"})
    source = opened("nat/table2_clean")
    assert source.encoder == labels.encoder
    (supervised,) = source.stages.values()
    assert isinstance(supervised, Finetune)
    assert (supervised.register_as, supervised.arms) == ("imagenet-labels", ("scratch",))
