"""Recipes that fine-tune on PASCAL VOC, and those whose heads are those of AlexNet or VGG, against their protocols."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.optim import build_optimizer
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.downstream.detect import Detection
from firstlight.tasks.downstream.starting_weights import fold_encoder
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import BatchNorm
from tests.support.batches import present_batch

PLAIN = [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
NORMALISED = [nn.Linear, BatchNorm, nn.ReLU, nn.Dropout, nn.Linear, BatchNorm, nn.ReLU, nn.Linear]


def read(name: str, *changes: str) -> Recipe:
    return load_recipe(RECIPES_FOLDER / f"{name}.yaml", ("dataset.root=/data", *changes), smoke=True)


def stages_of(recipe: Recipe, task: str) -> dict[str, Finetune]:
    return {
        name: stage for name, stage in recipe.stages.items() if isinstance(stage, Finetune) and stage.task.name == task
    }


def build(recipe: Recipe, stage: Finetune, classes: int = 20) -> Task:
    """The task of a stage on a fresh encoder, as the recipe's trial has it."""
    torch.manual_seed(0)
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    if stage.batch_norm == "fold":
        fold_encoder(encoder)
    return TASKS[stage.task.name](encoder, classes, **constructor_arguments(stage.task))


@pytest.mark.parametrize("name", ["fc6_8", "all"])
def test_classification_on_voc_is_the_protocol_of_voc_classification(name: str) -> None:
    """The numbers of train_cls.py, whose loss sums over the classes and divides by the number of images."""
    recipe = read("nat/table4")
    stage = stages_of(recipe, "multilabel")[name]
    assert stage.optimizer.model_dump() | {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-6} == (
        stage.optimizer.model_dump()
    )
    assert stage.clip_norm == 10.0
    whole = load_recipe(RECIPES_FOLDER / "nat/table4.yaml", ("dataset.root=/x",))
    assert whole.stages[name].learning_rates == (0.001, 0.003)  # type: ignore[union-attr]
    task = build(recipe, stage)
    assert isinstance(task, Classification)
    logits = torch.randn(16, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    b = present_batch(16, classes=20)
    (gradient,) = torch.autograd.grad(task.loss((logits,), b)["loss"], logits)
    present = b.targets["present"].double()
    expected = torch.where(present >= 0, logits.detach().sigmoid() - present, 0.0) / 16
    torch.testing.assert_close(gradient, expected)
    assert [type(layer) for layer in task.head] == PLAIN
    assert not any(isinstance(module, _BatchNorm) for module in task.modules())
    for layer in task.head:
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
            assert bool((layer.bias == torch.tensor(0.1)).all())
    assert stage.rescale == "new_layers"
    assert any(p.requires_grad for p in task.encoder.parameters()) == (name == "all")


@pytest.mark.parametrize("name", ["fast", "faster"])
def test_detection_on_voc_looks_at_boxes_as_fast_rcnn_does(name: str) -> None:
    recipe = read("nat/table4_detection", "dataset.image_size=800")
    task = build(recipe, stages_of(recipe, "detect")[name])
    assert isinstance(task, Detection)
    # 800 / 16, less what the first convolution and the poolings lose at the edges; after pool5 it is 24.
    assert task.encoder.shapes[-1] == (256, 49, 49)
    heads = task.detector.roi_heads
    assert heads.box_head.fc6.in_features == 256 * 6 * 6
    seen: list[Tensor] = []
    map_ = torch.randn(1, 256, 49, 49, generator=torch.Generator().manual_seed(0))
    seen.append(heads.box_roi_pool({"4": map_}, [torch.tensor([[160.0, 320.0, 255.0, 415.0]])], [(800, 800)]))
    assert torch.equal(seen[0], map_[:, :, 20:27, 10:17].unfold(2, 2, 1).unfold(3, 2, 1).amax((4, 5))), (
        "positions 10..16 and 20..26 in six cells each"
    )
    for layer, std in ((heads.box_head.fc7, 0.01), (heads.box_predictor.cls_score, 0.01)):
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.1)
    assert float(heads.box_predictor.bbox_pred.weight.detach().std()) == pytest.approx(0.001, rel=0.1)
    assert heads.box_head.dropout.p == 0.5
    assert heads.nms_thresh == 0.3
    assert not any(isinstance(module, _BatchNorm) for module in task.modules())


@pytest.mark.parametrize("name", ["nat/table4_detection", "nat/table4_labels_detection"])
def test_detection_on_voc_has_the_solver_of_fast_rcnn(name: str) -> None:
    """For 2 images there, and 4 times as many here: a rate 4 times as large, for a fourth of the steps.

    Biases do not decay (decay_mult: 0).
    """
    recipe = load_recipe(RECIPES_FOLDER / f"{name}.yaml", ("dataset.root=/data",))
    detections = stages_of(recipe, "detect")
    assert list(detections) == ["fast", "faster"]
    for key, stage in detections.items():
        assert (stage.batch_size, stage.steps, stage.optimizer.lr) == (2 * 4, 40_000 // 4, 0.001 * 4)
        assert stage.optimizer.arguments() == {"momentum": 0.9, "weight_decay": 5e-4}
        assert stage.schedule is not None
        assert stage.schedule.arguments() == {"step_size": 30_000 // 4, "gamma": 0.1}
        trial = read(name)
        task = build(trial, stages_of(trial, "detect")[key])
        groups = build_optimizer(stage.optimizer, task.parameter_groups(), 0.004).param_groups
        kept = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        biases = {id(p) for path, p in task.named_parameters() if path.endswith("bias") and p.requires_grad}
        assert kept == biases


DAE = [recipe.name for recipe in list_recipes() if recipe.name.startswith("dae/")]


@pytest.mark.parametrize("name", [name for name in DAE if stages_of(read(name), "multilabel")])
def test_heads_of_the_auto_encoders_are_vggs(name: str) -> None:
    """Plain layers, as table 1 lists them, with dropout after both hidden ones. Adam takes any scale of a loss."""
    recipe = read(name)
    for stage in stages_of(recipe, "multilabel").values():
        task = build(recipe, stage)
        assert isinstance(task, Classification)
        assert [type(layer) for layer in task.head] == PLAIN
        assert stage.task.reduction == "mean"
        assert (stage.optimizer.name, stage.clip_norm) == ("Adam", None)


SUPERVISED = [
    *("nat/table1", "nat/table2_clean", "nat/table2_high_pass", "nat/table2_sobel"),
]


@pytest.mark.parametrize("name", SUPERVISED)
def test_networks_that_are_trained_with_labels_are_those_of_alexnet_lua(name: str) -> None:
    recipe = read(name)
    stages: dict[str, Any] = {**stages_of(recipe, "classify"), **stages_of(recipe, "classify_square")}
    assert stages
    for stage in stages.values():
        task = build(recipe, stage, 10)
        assert isinstance(task, Classification)
        assert [type(layer) for layer in task.head] == NORMALISED
