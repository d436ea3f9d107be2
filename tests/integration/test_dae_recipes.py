"""The recipes of the denoising auto-encoder against its paper: networks, crops, corruptions, arms and figures."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import nn

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.augment.ops import sample_params
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.sections.reconstruct import Reconstruct
from firstlight.tasks.corruption import big_block_sides, small_block_count, small_block_side
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from tests.support.layouts import VOC_CLASSES

NAMES = [recipe.name for recipe in list_recipes() if recipe.name.startswith("dae/")]
# The crop of section 3.4 for each data set, and the side of the image that it is taken of.
CROPS = {
    **dict.fromkeys(("cifar10", "cifar100"), (29, 32)),
    "stl10": (89, 96),
    **dict.fromkeys(("voc2007", "voc2012", "imagenet_devkit", "list"), (225, 256)),
}


def opened(name: str) -> Recipe:
    return load_recipe(RECIPES_FOLDER / f"{name}.yaml", ("dataset.root=/data",))


def list_stages(kind: type, names: list[str] = NAMES) -> list[tuple[str, str]]:
    return [(name, key) for name in names for key, stage in opened(name).stages.items() if isinstance(stage, kind)]


def find_pretraining(reference: str) -> Pretrain:
    """Returns the stage, of any recipe, that registers the encoder `models:/...@current`."""
    stages: Iterator[Any] = (stage for name in NAMES for stage in opened(name).stages.values())
    (found,) = [s for s in stages if isinstance(s, Pretrain) and f"models:/{s.register_as}@current" == reference]
    return found


@pytest.mark.parametrize(
    ("name", "widths", "sides", "layers"),
    [
        # 15 convolutions with a classifier are "a 16-layer network" (section 4.2.3), with their decoder 30 layers.
        ("dae/table2_cifar10", [64] * 5 + [128] * 5 + [256] * 5, [29, 15, 8, 4], 30),
        ("dae/stl10", [64] * 3 + [128] * 3 + [256] * 4 + [512] * 5, [89, 45, 23, 12, 6], 30),
        ("dae/imagenet", [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6, [225, 113, 57, 29, 15, 8], 26),
    ],
)
def test_networks_are_those_of_table_1(name: str, widths: list[int], sides: list[int], layers: int) -> None:
    recipe = opened(name)
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    convolutions = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == widths
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    # The last convolution of a block halves the side.
    strided = [number for number, layer in enumerate(convolutions) if layer.stride == (2, 2)]
    assert [recipe.dataset.image_size, *(encoder.shapes[number][1] for number in strided)] == sides
    assert strided[-1] == len(convolutions) - 1
    assert not any(isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) for layer in encoder.modules())
    decoder = Decoder(encoder.shapes, encoder.input.channels, encoder.image_size)
    mirrored = [layer for layer in decoder.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert len(convolutions) + len(mirrored) == layers
    # Every second layer and the input (section 3.4).
    assert list(decoder.joined) == list(range(2, len(convolutions), 2))
    assert decoder.with_input


@pytest.mark.parametrize("name", NAMES)
def test_images_are_cropped_as_in_section_3_4(name: str) -> None:
    dataset = opened(name).dataset
    side, whole = CROPS[dataset.name] if name != "dae/imagenet_32" else (29, 32)
    crop, flip = (op.model_dump() for op in dataset.train_augment)
    (centre,) = (op.model_dump() for op in dataset.eval_augment)
    assert (crop["op"], flip["op"], centre["op"]) == ("random_crop", "horizontal_flip", "center_crop")
    assert dataset.image_size == side
    for op in (crop, centre):
        assert op.get("size") == side or op["scale"] * whole == side


@pytest.mark.parametrize(("name", "key"), [*list_stages(Pretrain), *list_stages(Finetune)])
def test_trainings_are_optimised_as_in_section_3_4(name: str, key: str) -> None:
    """Adam, 1e-4 at first, a tenth when the loss does not drop; weights are N(0, 0.01^2)."""
    recipe = opened(name)
    stage: Any = recipe.stages[key]
    assert (stage.optimizer.name, stage.optimizer.lr, stage.optimizer.arguments()) == ("Adam", 1e-4, {})
    assert (stage.schedule.name, stage.schedule.interval) == ("ReduceLROnPlateau", "epoch")
    assert stage.schedule.arguments()["factor"] == 0.1
    assert recipe.network_spec["init"] == "gaussian"
    if isinstance(stage, Finetune):
        assert stage.task.init == "gaussian"  # type: ignore[attr-defined]
        assert 1e-4 in stage.learning_rates
        assert "gaussian" in stage.arms
    else:
        assert (stage.method.init, stage.method.sigma[0] >= 10.0, stage.method.sigma[1] <= 50.0) == (
            *("gaussian", True, True),
        )


def test_corruptions_are_those_of_supplement_a() -> None:
    assert [small_block_count(images) for images in (5011, 93_100, 99_999, 100_000, 1_255_543)] == [21, 21, 21, 35, 35]
    assert [small_block_side(side) for side in (29, 89, 225)] == [4, 11, 28]
    assert big_block_sides(225) == (57, 112), "whole pixels in [l / 4, l / 2]"


@pytest.mark.parametrize(
    ("name", "corruption", "blocks"),
    [
        # Section 4.1: noise of pixels for small images, small blocks for large ones (and section 4.3 for STL-10).
        ("dae/table2_cifar10", "pixel_gaussian", None),
        ("dae/table2_cifar100", "pixel_gaussian", None),
        ("dae/imagenet_32", "pixel_gaussian", None),
        ("dae/stl10", "small_blocks", 35),
        ("dae/table2_voc2007", "small_blocks", None),
        ("dae/imagenet", "small_blocks", None),
        ("dae/table6_imagenet", "small_blocks", None),
        ("dae/table8_animal", "small_blocks", None),
        ("dae/table8_vehicle", "small_blocks", None),
    ],
)
def test_images_are_corrupted_as_the_experiment_says(name: str, corruption: str, blocks: int | None) -> None:
    methods: list[Any] = [stage.method for stage in opened(name).stages.values() if isinstance(stage, Pretrain)]
    found = {(method.corruption, method.blocks, method.sigma) for method in methods}
    assert found == {(corruption, blocks, (10.0, 50.0))}


def test_ablations_on_imagenet_differ_from_the_whole_in_one_setting() -> None:
    base = find_pretraining("models:/dae-imagenet@current")
    shortcuts, corruptions = opened("dae/table6_imagenet").stages, opened("dae/table7_imagenet").stages
    for field, stages in (("shortcuts", shortcuts), ("corruption", corruptions)):
        for key, stage in stages.items():
            assert isinstance(stage, Pretrain)
            assert getattr(stage.method, field) == key
            whole = {field: getattr(base.method, field)}
            assert stage.method.model_copy(update=whole) == base.method
            assert stage.model_copy(update={"method": base.method, "register_as": base.register_as}) == base
    assert (list(shortcuts), base.method.shortcuts) == (["none", "input_output"], "full")  # type: ignore[attr-defined]
    assert [*corruptions, base.method.corruption] == [  # type: ignore[attr-defined]
        *("pixel_gaussian", "patch_gaussian", "big_block", "small_blocks")
    ]


def test_table_2_has_its_four_ways_to_draw_the_first_weights() -> None:
    for name in ("cifar10", "cifar100", "voc2007"):
        stage: Any = opened(f"dae/table2_{name}").stages["finetune"]
        assert stage.arms == ("pretrained", "he", "xavier", "gaussian")


@pytest.mark.parametrize(
    ("name", "key"), [pair for pair in list_stages(Finetune) if opened(pair[0]).dataset.name == "voc2007"]
)
def test_classification_on_voc_averages_ten_random_crops(name: str, key: str) -> None:
    """Section 3.4, after Pathak et al."""
    stage: Any = opened(name).stages[key]
    assert (stage.test_crops, stage.test_crop, stage.task.name) == (10, "random", "multilabel")


def test_figure_4_is_scored_on_every_pixel_of_an_image() -> None:
    """The centre crop of 225 of 256 pixels is 58 % of a 500 x 375 image."""
    recipe = opened("dae/figure4")
    stage: Any = recipe.stages["finetune"]
    assert (recipe.dataset.name, recipe.dataset.annotations) == ("voc2012", ("mask",))
    assert (stage.task.name, stage.task.head, stage.scored_pixels) == ("segment", "mirror", "image")
    assert stage.arms == ("pretrained_decoder", "pretrained", "gaussian")
    sizes = np.array([[500, 375], [375, 500], [500, 500], [334, 500]])
    ids, covered = np.arange(len(sizes)), np.zeros((len(sizes), 500, 500), bool)
    for ops in stage.build_covering_windows(sizes):
        assert ops[0].scale * 256 == recipe.dataset.image_size, "as large as the crops of the training"
        drawn = sample_params([op.model_dump() for op in ops], derive_view_keys(0, ids, ids, 0), sizes, 225)
        boxes: list[Any] = drawn[0].params_per_image()
        for row, box in enumerate(boxes):
            rows = slice(math.ceil(box.top), math.floor(box.top + box.height))
            covered[row, rows, math.ceil(box.left) : math.floor(box.left + box.width)] = True
    # Windows touch or overlap; pixels that two of them share in part are the only ones that this rounding may miss.
    for seen, (width, height) in zip(covered, sizes.tolist(), strict=True):
        assert seen[:height, :width].mean() > 0.99


def test_figures_9_and_10_show_test_images() -> None:
    for name in ("dae/table2_cifar10", "dae/stl10"):
        stage: Any = opened(name).stages["pretrain"]
        assert stage.pictures == "test"


@pytest.mark.parametrize(("name", "key"), list_stages(Reconstruct))
def test_figures_of_voc_have_the_corruption_of_their_auto_encoder(name: str, key: str) -> None:
    """Figures 5 and 8: images of VOC, which are not trained on."""
    recipe = opened(name)
    stage, source = recipe.stages[key], find_pretraining(recipe.stages[key].encoder)  # type: ignore[attr-defined]
    method: Any = source.method
    assert isinstance(stage, Reconstruct)
    assert (recipe.dataset.name, stage.images) == ("voc2007", "test")
    assert (stage.corruption, stage.sigma, stage.patch) == (method.corruption, method.sigma, method.patch)
    assert stage.blocks == (21 if name == "dae/figure5" or key != "small_blocks" else 35)
    assert stage.shown_map == method.shown_map == (12 if name == "dae/figure5" else None)


def test_figure_8_has_all_four_corruptions() -> None:
    stages = opened("dae/figure8").stages.values()
    assert [stage.corruption for stage in stages if isinstance(stage, Reconstruct)] == [
        *("pixel_gaussian", "patch_gaussian", "big_block", "small_blocks")
    ]


def test_table_5_has_the_ten_folds_of_stl10() -> None:
    recipe = opened("dae/table5")
    stage: Any = recipe.stages["finetune"]
    assert (recipe.seeds, stage.labels_subset, stage.labels_per_class) == (tuple(range(10)), "fold{seed}", None)


def test_table_8_groups_the_classes_as_voc_does() -> None:
    """The other seven are those of 'indoor' and the person."""
    for stage in opened("dae/table8").stages.values():
        assert isinstance(stage, Finetune)
        groups = {name: set(classes) for name, classes in stage.class_groups.items()}
        assert {name: len(classes) for name, classes in groups.items()} == {"animal": 6, "vehicle": 7}
        rest = set(VOC_CLASSES) - groups["animal"] - groups["vehicle"]
        assert rest == {"bottle", "chair", "diningtable", "person", "pottedplant", "sofa", "tvmonitor"}


def test_supplement_a_compares_drawn_with_fixed_noise_levels() -> None:
    stages = opened("dae/supplement_a").stages.values()
    methods: list[Any] = [stage.method for stage in stages if isinstance(stage, Pretrain)]
    found = {(method.corruption, method.sigma) for method in methods}
    assert {("pixel_gaussian", (10.0, 50.0)), ("patch_gaussian", (10.0, 50.0))} <= found
    fixed = {kind: {low for one, (low, high) in found if one == kind and low == high} for kind, _ in found}
    assert fixed == {"pixel_gaussian": {10.0, 30.0, 50.0}, "patch_gaussian": {30.0}}
