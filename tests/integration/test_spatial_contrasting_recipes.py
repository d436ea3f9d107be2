"""The recipes of Spatial Contrasting against the paper, and against the public code where the paper is silent."""

from typing import Any

import pytest
import torch
from torch import nn

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain.method import TrainingInfo
from firstlight.tasks.pretrain.spatial_contrasting import SpatialContrasting

NAMES = [recipe.name for recipe in list_recipes() if recipe.name.startswith("spatial_contrasting/")]


def opened(name: str) -> Recipe:
    return load_recipe(RECIPES_FOLDER / f"{name}.yaml", ("dataset.root=/data",))


@pytest.mark.parametrize("name", NAMES)
def test_patches_are_those_of_eq_2_on_the_map_of_the_port(name: str) -> None:
    """Two patches of each image; 4 x 4 places of the map behind the second pooling."""
    recipe = opened(name)
    stage: Any = recipe.stages["pretrain"]
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    learner = SpatialContrasting(encoder, TrainingInfo(8, 1, 0, 10), **constructor_arguments(stage.method))
    assert (learner.level, learner.contrast, learner.pairs) == ("feature", "eq2", [(0, 1)])
    (layer,) = learner.layers
    assert encoder.shapes[layer] == (192, recipe.dataset.image_size // 4, recipe.dataset.image_size // 4)
    assert (learner.patch_size, learner.patch_features, learner.supervised_weight) == (4, "flatten", 0.0)


def test_network_is_that_of_the_port() -> None:
    """spatial_contrasting_network.py and convnet_pretrained.py, without the last layer."""
    encoder = Encoder(opened("spatial_contrasting/table2").network_spec, 32)
    convolutions = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, layer.kernel_size[0]) for layer in convolutions] == [
        *[(96, 3)] * 3,
        *[(192, 3)] * 4,
        (192, 1),
    ]
    slopes = [layer.negative_slope for layer in encoder.modules() if isinstance(layer, nn.LeakyReLU)]
    assert slopes == [0.3] * 8, "the default of Keras"
    assert [shape[1] for shape in encoder.shapes] == [16, 8, 8]


@pytest.mark.parametrize("name", NAMES)
def test_trainings_are_optimised_as_the_long_version_says(name: str) -> None:
    """0.1, then the same regime from 0.01; both fall to a tenth where the loss stops. The whole network is trained."""
    stages: Any = opened(name).stages
    for key, rate in (("pretrain", 0.1), ("finetune", 0.01)):
        stage = stages[key]
        assert (stage.optimizer.name, stage.optimizer.lr, stage.optimizer.decay_all) == ("SGD", rate, True)
        assert stage.optimizer.arguments() == {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
        assert (stage.schedule.name, stage.schedule.arguments()["factor"]) == ("ReduceLROnPlateau", 0.1)
        shift, *flip = (op.op for op in stage.augment)
        assert (shift, flip) == ("random_shift", [] if name.endswith("mnist") else ["horizontal_flip"])
    assert (stages["finetune"].task.name, stages["finetune"].task.train) == ("classify", "all")
    assert stages["finetune"].learning_rates[0] == 0.01


def test_labels_are_those_of_section_5() -> None:
    """All of STL-10 and MNIST; 4,000 of CIFAR-10. The pretraining has all images."""
    found = {name: opened(name).stages["finetune"].labels_per_class for name in NAMES}  # type: ignore[attr-defined]
    assert found == {
        "spatial_contrasting/mnist": None,
        "spatial_contrasting/table1": None,
        "spatial_contrasting/table2": 4000 // 10,
    }
    for name in NAMES:
        stage: Any = opened(name).stages["pretrain"]
        assert (stage.labels_per_class, stage.max_unlabelled, opened(name).dataset.max_train) == (None, None, None)


def test_loss_of_the_recipes_is_eq_2() -> None:
    recipe = opened("spatial_contrasting/table2")
    stage: Any = recipe.stages["pretrain"]
    encoder = Encoder(recipe.network_spec, 32)
    learner = SpatialContrasting(encoder, TrainingInfo(8, 1, 0, 10), **constructor_arguments(stage.method))
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = torch.stack([torch.stack([(a - b).norm() for b in second]) for a in first])
    expected = -(torch.exp(-apart.diagonal()) / torch.exp(-apart).sum(1)).log().mean()
    found, _ = learner._contrast_patches(torch.stack((first, second), 1))
    torch.testing.assert_close(found, expected)
