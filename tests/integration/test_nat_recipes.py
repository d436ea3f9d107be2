"""The recipes of Noise As Targets take the input of the authors' code, and figure 4 and table 4 are whole."""

import numpy as np
import pytest
import torch

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.stages.pretraining.section import Pretrain
from firstlight.pipeline.stages.sections.finetune import Finetune
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
