"""A ViT under every method and task: it trains, on two workers as on one, or is refused in one line."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.downstream.detect import Detection
from firstlight.tasks.downstream.segment import Segmentation
from firstlight.tasks.downstream.starting_weights import fold_encoder
from firstlight.tasks.learner import Batch, Learner
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from firstlight.tasks.nn.weight_init import initialize_lsuv
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.pretrain.method import TrainingInfo
from firstlight.tasks.self_distillation import patch_masks
from tests.support.batches import image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_encoder, build_task
from tests.support.local_training import Stopped, find_copy, train, train_with_copies
from tests.support.two_workers import assert_workers_equal_one

SIZE = 32
VIT: dict[str, Any] = {"name": "timm", "model": "vit_tiny_patch16_224", "img_size": SIZE, "patch_size": 4}
# Six blocks of 64 channels.
SMALL: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": SIZE, "patch_size": 8}
CLASSES = 3
INFO = TrainingInfo(size=24, epochs=4, seed=7, classes=CLASSES)
NAT: dict[str, Any] = {"dim": 8, "hidden": (), "norm": "group"}
DINO: dict[str, Any] = {"local_views": 0, "prototypes": 9, "hidden": (8,), "bottleneck": 4, "patch_loss": 1.0}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *(("nat", {**NAT, "pool": pool}) for pool in ("avg", "flatten", "cls", "cls_avg")),
    ("spatial_contrasting", {"patch_size": 2}),
    ("spatial_contrasting", {"patch_size": 2, "layers": (1, -1), "supervised_weight": 0.5}),
    ("spatial_contrasting", {"level": "pixel", "patch_size": 16}),
    ("clustering_locality", {"supervised": False, "alpha": 0.5, "beta": 0.5}),
    ("clustering_locality", {}),
    *(("dae", {"shortcuts": shortcuts, "norm": "group"}) for shortcuts in ("full", "input_output", "none")),
    *(("super_and", {"dim": 8, "rounds": 2, "pool": pool}) for pool in ("avg", "cls")),
    # Instance discrimination.
    ("super_and", {"dim": 8, "rounds": 1, "neighbours": False, "ue": False, "aug": False, "views": 1}),
    ("fixmatch", {"cutoff": 0.3, "pool": "cls"}),
    (
        "distill",
        {
            "teacher": {"name": "timm", "model": "test_vit", "img_size": SIZE, "patch_size": 8},
            "pool": "cls",
            "norm": "group",
        },
    ),
    ("byol", {"dim": 8, "hidden": (16,), "norm": "sync"}),
    ("vicreg", {"dim": 8, "norm": "sync"}),
    *(("mae", {"positions": positions, "decoder_dim": 8}) for positions in ("learned", "fixed")),
    ("lejepa", {"local_views": 0, "hidden": (16,), "norm": "sync", "directions": 8}),
    *(("simclr", {"dim": 8, "norm": "sync", "pool": pool}) for pool in (None, "avg", "cls_avg")),
    *(("dino", {**DINO, "pool": pool}) for pool in ("avg", "cls")),
]


def named(settings: object) -> str:
    return (
        settings
        if isinstance(settings, str)
        else "-".join(map(str, settings.values()))
        if isinstance(settings, dict)
        else ""
    )


def build_small_learner(name: str, options: dict[str, Any]) -> Learner:
    torch.manual_seed(0)
    return METHODS[name](Encoder(SMALL, SIZE), INFO, **options).double()


def small_batch(views: int = 2) -> Batch:
    rows = torch.arange(12)
    labels = torch.where(rows % 2 == 0, rows % CLASSES, -1)
    return image_batch(rows, size=SIZE, views=views, labels=labels, dtype=torch.float64)


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=named)
def test_every_method_on_two_workers_is_that_on_one(pool: Pool, name: str, options: dict[str, Any]) -> None:
    # timm resamples position embeddings in single precision, which the patches of `pixel` need.
    atol = 1e-8 if options.get("level") == "pixel" else 1e-12
    one = assert_workers_equal_one(pool, partial(build_small_learner, name, options), small_batch(), atol=atol)
    learner = build_small_learner(name, options)
    trained = {name for name, parameter in learner.named_parameters() if parameter.requires_grad}
    assert set(one.gradients) == trained, "no trained parameter is without a gradient"


def test_every_method_trains_the_network_of_the_recipes() -> None:
    for name, options in (SETTINGS[0], SETTINGS[4], SETTINGS[8], SETTINGS[9], SETTINGS[12]):
        torch.manual_seed(0)
        learner = METHODS[name](Encoder(VIT, SIZE), INFO, **options).train()
        learner.begin_epoch(0)
        losses = learner(image_batch(torch.arange(4), size=SIZE, views=2, labels=torch.tensor([0, 1, 2, -1])))
        losses["loss"].backward()
        assert losses["loss"].isfinite(), name
        assert float(learner.encoder.get_parameter("stages.net.model.cls_token").grad.abs().sum()) > 0, name
        grids = learner.eval().image_grids(image_batch(torch.arange(2), size=SIZE))
        assert bool(grids) == (name in ("dae", "clustering_locality"))
        assert all(row.images.shape[-2:] == (SIZE, SIZE) for grid in grids for row in grid.rows)


def test_methods_refuse_settings_that_a_vit_lacks_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^patch_size: 6 pixels .* divisible by patch size"):
        METHODS["spatial_contrasting"](Encoder(SMALL, SIZE), INFO, level="pixel", patch_size=6)
    with pytest.raises(
        ValueError, match=r"^patch_size: 5 is larger than map 5 of the encoder, which has 4x4 positions"
    ):
        METHODS["spatial_contrasting"](Encoder(SMALL, SIZE), INFO, patch_size=5)
    with pytest.raises(
        ValueError, match=r"^pool: 'cls' needs a class token, and convnet has none; valid: avg, flatten"
    ):
        METHODS["nat"](build_encoder({}, 8), INFO, pool="cls")


@pytest.mark.parametrize("pool", ["avg", "flatten", "cls", "cls_avg"])
@pytest.mark.parametrize("train", ["all", "head", 4])
def test_classification_takes_every_pooling_of_every_layer(pool: str, train: Any) -> None:
    for name in ("classify", "classify_square", "multilabel"):
        task = build_task(TASKS[name], Encoder(SMALL, SIZE), CLASSES, pool=pool, train=train, layer=4, layer_decay=0.5)
        batch = image_batch(torch.arange(4), size=SIZE, labels=torch.tensor([0, 1, 2, 0]))
        present = torch.tensor([[1, 0, -1], [0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.int8)
        batch = Batch(batch.ids, batch.rows, batch.labels, batch.views, batch.passes, {"present": present})
        task.train()(batch)["loss"].backward()
        without = [key for key, p in task.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, name
        factors = [factor for factor, _ in task.parameter_groups()]
        assert factors == {"all": [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625], "head": [1.0], 4: [1.0, 1.0]}[train]
        blocks = {key.split(".")[5] for key, p in task.named_parameters() if p.requires_grad and "model.blocks" in key}
        assert blocks == {"all": {"0", "1", "2", "3", "4"}, "head": set(), 4: {"4"}}[train]


def test_layer_decay_of_the_whole_network_is_by_block() -> None:
    task = build_task(Classification, Encoder(SMALL, SIZE), CLASSES, layer_decay=0.5)
    names = {parameter: name for name, parameter in task.named_parameters()}
    groups = [(factor, {names[p] for p in group}) for factor, group in task.parameter_groups()]
    assert [factor for factor, _ in groups] == [1.0, *(0.5**depth for depth in range(6))]
    assert {"encoder.stages.net.model.norm.weight"} <= groups[1][1]
    assert {"encoder.stages.net.model.pos_embed", "encoder.stages.net.model.cls_token"} <= groups[-1][1]


def test_classification_on_two_workers_is_that_on_one(pool: Pool) -> None:
    batch = small_batch(1)
    labelled = Batch(batch.ids, batch.rows, batch.rows % CLASSES, batch.views, batch.passes)
    assert_workers_equal_one(pool, build_double_classifier, labelled)


def build_double_classifier() -> Learner:
    torch.manual_seed(0)
    return Classification(Encoder(SMALL, SIZE), CLASSES, pool="cls_avg").double()


@pytest.mark.parametrize("head", ["mirror", "fcn", "deeplab"])
def test_every_pixel_of_a_vit_gets_a_class(head: Any) -> None:
    task = build_task(Segmentation, Encoder(SMALL, SIZE), CLASSES, head=head).train()
    mask = torch.randint(CLASSES, (4, SIZE, SIZE), dtype=torch.uint8)
    batch = image_batch(torch.arange(4), size=SIZE)
    losses = task(Batch(batch.ids, batch.rows, batch.labels, batch.views, batch.passes, {"mask": mask}))
    losses["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert task.eval().compute_logits(batch.views[0]).shape == (4, CLASSES, SIZE, SIZE)


def boxes_batch(count: int = 4) -> Batch:
    batch = image_batch(torch.arange(count), size=SIZE)
    targets = {
        "boxes": torch.tensor([[[4.0, 4.0, 20.0, 20.0]]]).expand(count, 1, 4).clone(),
        "box_classes": torch.arange(count)[:, None] % 2,
        "difficult": torch.zeros(count, 1, dtype=torch.bool),
    }
    return Batch(batch.ids, batch.rows, batch.labels, batch.views, batch.passes, targets)


@pytest.mark.parametrize(
    "options", [{}, {"proposals": "windows"}, {"pyramid": 16, "anchors": (16,)}, {"roi_pooling": "max"}], ids=named
)
def test_objects_are_detected_on_the_tokens_of_a_vit(options: dict[str, Any]) -> None:
    task = build_task(
        Detection, Encoder(SMALL, SIZE), 2, **{"anchors": (8, 16), "hidden": 16, "sampled": 16, **options}
    )
    task.train()(boxes_batch())["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert len(task.eval().detect_objects(boxes_batch().views[0])) == 4


def test_tasks_refuse_settings_that_a_vit_lacks_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^anchors: \[32, 64\] are 2 for the 1 levels of the pyramid"):
        Detection(Encoder(SMALL, SIZE), 2, anchors=(32, 64), pyramid=16)
    with pytest.raises(ValueError, match=r"^last_pool: 'drop' is not valid: timm does not end with one max-pooling"):
        Detection(Encoder(SMALL, SIZE), 2, last_pool="drop")
    with pytest.raises(ValueError, match=r"^encoder.patch_size: maps 12 pixels apart"):
        Detection(Encoder({**SMALL, "img_size": 48, "patch_size": 12}, 48), 2)
    with pytest.raises(ValueError, match=r"^the network has no batch normalisation$"):
        fold_encoder(Encoder(SMALL, SIZE))


@pytest.mark.parametrize(("pool", "size"), [("avg", 64), ("grid", 64 * 16), ("cls", 64), ("cls_avg", 128)])
@torch.no_grad()
def test_features_of_every_layer_and_pooling(pool: Any, size: int) -> None:
    encoder, images = Encoder(SMALL, SIZE).eval(), image_batch(torch.arange(3), size=SIZE).views[0]
    found = FeatureExtractor(encoder, None, (-1, 2), pool)(images)
    assert [tuple(features.shape) for features in found] == [(3, size)] * 2
    if pool == "cls":
        assert torch.equal(found[1], encoder(images).class_tokens[2])
    with pytest.raises(ValueError, match=r"^pool: 'cls' needs a class token"):
        FeatureExtractor(build_encoder({}, 8), None, (-1,), "cls")


def test_lsuv_scales_every_layer_of_a_vit() -> None:
    encoder = Encoder(SMALL, SIZE).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    initialize_lsuv(encoder, image_batch(torch.arange(4), size=SIZE).views[0])
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {f"stages.net.model.blocks.{k}.attn.qkv.weight" for k in range(6)} <= changed


VIT_CHANGES: dict[str, Any] = {
    "encoder": {"name": "timm", "model": "test_vit", "img_size": 8, "patch_size": 2, "input": "gray"},
    "stages__pretrain__optimizer": {"name": "AdamW", "lr": 0.001},
}
METHOD_SECTIONS: dict[str, dict[str, Any]] = {
    "nat": {"name": "nat", "dim": 8, "hidden": [8], "pool": "cls", "norm": "sync", "permutation_period": 2},
    "dae": {"name": "dae", "norm": "sync"},
    "super_and": {"name": "super_and", "dim": 8, "rounds": 2, "ue_period": 1, "pool": "cls_avg"},
    "mae": {"name": "mae", "positions": "fixed", "decoder_dim": 8, "decoder_depth": 1},
    "dino": {"name": "dino", **DINO, "hidden": [8], "local_views": 1, "koleo": 0.1, "centering": "sinkhorn_knopp"},
}


# Blocks that DINO tries for a mask. Each takes forty operators, and a training draws masks as it does with all of them.
few_tries = mock.patch.object(patch_masks, "MASK_TRIES", 6)


def train_on_this_rank(folder: str, store: str, name: str, stop: int | None) -> str | None:
    try:
        with few_tries:
            return train(Path(folder), Store.open(Path(store)), stop, **list_changes(name))[0]
    except Stopped:
        return None


def train_with_copy_on_this_rank(folder: str, store: str, name: str, step: int) -> str:
    with few_tries:
        return train_with_copies(Path(folder), Store.open(Path(store)), (step,), **list_changes(name))


def list_changes(name: str) -> dict[str, Any]:
    return {**VIT_CHANGES, "stages__pretrain__method": METHOD_SECTIONS[name]}


@pytest.mark.parametrize("name", METHOD_SECTIONS)
def test_stopped_training_of_a_vit_resumes_bit_identical(pool: Pool, tmp_path: Path, digits: Store, name: str) -> None:
    """Stopped in the middle of an epoch and after the first step of the next, on one worker and on two."""
    store, folders = str(digits.path), [tmp_path / "one", tmp_path / "two"]
    one, two = (str(find_copy(folder, 2)) for folder in folders)
    clean = train_with_copy_on_this_rank(str(folders[0]), store, name, 2)
    assert [train_on_this_rank(one, store, name, stop) for stop in (4, None)] == [None, clean]
    both = pool.run(train_with_copy_on_this_rank, str(folders[1]), store, name, 2)
    assert both[0] == both[1]
    assert [pool.run(train_on_this_rank, two, store, name, stop) for stop in (4, None)] == [[None, None], both]
