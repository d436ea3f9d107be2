"""DINO: the loss of the method, its teacher and schedules, with small crops, patch loss and KoLeo."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import batch_requirements
from firstlight.tasks.pretrain.dino import Dino
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from tests.support import references_dino
from tests.support.batches import batch_of_images, image_batch
from tests.support.gloo import Pool
from tests.support.gradient_cache import assert_parts_equal_whole
from tests.support.learners import build_method
from tests.support.two_workers import assert_workers_equal_one

INFO = TrainingInfo(size=48, epochs=4, seed=7, steps=20)
SMALL: dict[str, Any] = {"prototypes": 10, "hidden": (8,), "bottleneck": 5, "local_views": 2}
VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": 16, "patch_size": 4}
# Half of the crops have masks; 1 masks almost all.
PATCHES: dict[str, Any] = {"patch_loss": 1.0, "mask_probability": 0.8, "koleo": 0.1}


def build(dtype: torch.dtype = torch.float64, norm: str = "group", **options: Any) -> Dino:
    return build_method(Dino, INFO, {"norm": norm}, dtype=dtype, **{**SMALL, **options})


def build_vit(local_views: int = 2, **options: Any) -> Dino:
    torch.manual_seed(0)
    return Dino(Encoder(VIT, 16), INFO, **{**SMALL, **PATCHES, "local_views": local_views, **options}).double()


def crops(count: int = 12, size: int = 8, local_views: int = 2, turn: int = 0) -> Batch:
    """A batch of two large views and of small ones of half their side."""
    batch = image_batch(torch.arange(count), size=size, views=2 + local_views, dtype=torch.float64, turn=turn)
    small = tuple(view[..., : size // 2, : size // 2].contiguous() for view in batch.views[2:])
    return Batch(batch.ids, batch.rows, batch.labels, (*batch.views[:2], *small), batch.passes)


def move_weights(learner: Dino) -> None:
    """Makes the student another network than its teacher, and gives the centre a value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (*learner.encoder.parameters(), *learner.head.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        learner.center.value.copy_(torch.rand(len(learner.center.value), generator=generator))


@pytest.mark.parametrize("local_views", [0, 1, 3])
def test_loss_is_that_of_the_paper(local_views: int) -> None:
    learner, batch = build(local_views=local_views), crops(5, local_views=local_views)
    move_weights(learner)
    center = learner.center.value.clone()
    with torch.no_grad():
        found = float(learner(batch)["loss"])
        student = torch.stack([learner.head(learner.encoder(view)[-1].mean((2, 3))) for view in batch.views])
        network = learner.exported_encoder()
        teacher = torch.stack([learner.teacher_head(network(view)[-1].mean((2, 3))) for view in batch.views[:2]])
    assert network is not learner.encoder
    assert found == pytest.approx(references_dino.dino_loss(student, teacher, center, 0.1, 0.04), rel=1e-10)


def test_patch_loss_and_koleo_are_added_with_their_weights() -> None:
    learner, batch = build_vit(patch_loss=0.7, koleo=0.3), crops(5, 16)
    learner.patch_center.value.copy_(torch.rand(10))
    centers = learner.center.value.clone(), learner.patch_center.value.clone()
    with torch.no_grad():
        logged = {name: float(value) for name, value in learner(batch).items()}
        logits, taught, features, patches, taught_patches, weights = learner.embed(batch)
    wanted = references_dino.dino_loss(logits.transpose(0, 1), taught.transpose(0, 1), centers[0], 0.1, 0.04)
    assert logged["dino_loss"] == pytest.approx(wanted, rel=1e-10)
    wanted = sum(references_dino.koleo_loss(view) for view in features.unbind(1))
    assert logged["koleo_loss"] == pytest.approx(wanted, rel=1e-5)
    of_views = [torch.stack(x.chunk(2, 1)) for x in (patches, taught_patches, weights > 0)]
    wanted = references_dino.ibot_loss(of_views[0], of_views[1], of_views[2], centers[1], 0.1, 0.04)
    assert logged["patch_loss"] == pytest.approx(wanted, rel=1e-10)
    total = logged["dino_loss"] + 0.7 * logged["patch_loss"] + 0.3 * logged["koleo_loss"]
    assert logged["loss"] == pytest.approx(total, rel=1e-12)


def test_student_does_not_see_masked_patches_and_the_teacher_does() -> None:
    learner = build_vit(mask_probability=1.0, mask_ratio=(0.5, 0.5), local_views=0).eval()
    batch = crops(4, 16, 0)
    masks = learner._draw_masks(batch, [torch.zeros(4, 1, 4, 4)] * 2)
    hidden = []
    for view, mask in zip(batch.views, masks, strict=True):
        pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        hidden.append(torch.where(pixels, 0.0, view))
    changed = Batch(batch.ids, batch.rows, batch.labels, tuple(hidden), batch.passes)
    with torch.no_grad():
        before, after = learner.embed(batch), learner.embed(changed)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[3], after[3])
    assert not torch.equal(before[1], after[1])
    assert not torch.equal(before[4], after[4])
    assert bool((before[5] > 0).any(1).all())


def test_masks_change_from_pass_to_pass_and_from_view_to_view() -> None:
    learner, maps = build_vit(mask_probability=1.0), [torch.zeros(12, 1, 4, 4)] * 2
    first, again, later = (learner._draw_masks(crops(12, 16, turn=turn), maps) for turn in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], later[0])


def test_gradcheck_of_the_loss_of_the_outputs() -> None:
    learner, batch = build_vit(student_temperature=0.5, local_views=1), crops(3, 16, 1)
    outputs = [output.detach() for output in learner.embed(batch)]
    trained = [outputs[k].requires_grad_() for k in (0, 2, 3)]

    def loss(logits: Tensor, features: Tensor, patches: Tensor) -> Tensor:
        return learner.loss((logits, outputs[1], features, patches, outputs[4], outputs[5]), batch)["loss"]

    assert torch.autograd.gradcheck(loss, trained, fast_mode=True)


def test_no_gradient_reaches_the_teacher() -> None:
    learner, batch = build_vit(patch_head="own"), crops(4, 16)
    learner(batch)["loss"].backward()
    taught = [p for name, p in learner.named_parameters() if "teacher" in name]
    trained = [p for name, p in learner.named_parameters() if "teacher" not in name]
    assert taught
    assert not any(p.requires_grad for p in taught)
    assert all(p.grad is not None for p in trained if p.requires_grad)
    embedded = [output.detach().requires_grad_() for output in learner.embed(batch)]
    learner.loss(tuple(embedded), batch)["loss"].backward()
    assert [output.grad is not None for output in embedded] == [True, False, True, True, False, False]


@pytest.mark.parametrize(
    ("epoch", "temperature", "frozen"),
    [(0, 0.04, True), (1, 0.05, True), (2, 0.06, False), (3, 0.07, False), (9, 0.07, False)],
)
def test_temperature_rises_in_the_warmup_and_prototypes_are_frozen_first(
    epoch: int, temperature: float, frozen: bool
) -> None:
    """The temperatures are numpy.linspace(0.04, 0.07, 4), as in the authors' code."""
    learner = build(warmup_epochs=4, frozen_epochs=2)
    learner.begin_epoch(epoch)
    assert learner.temperature == pytest.approx(temperature)
    learner(crops())["loss"].backward()
    gradient = learner.head.prototypes.direction.grad
    assert gradient is not None
    assert bool(gradient.any()) != frozen


@pytest.mark.parametrize(("warmup_epochs", "wanted"), [(0, 0.07), (1, 0.04)])
def test_short_warmups(warmup_epochs: int, wanted: float) -> None:
    learner = build(warmup_epochs=warmup_epochs)
    learner.begin_epoch(0)
    assert learner.temperature == wanted


def test_teacher_follows_with_a_momentum_that_rises_by_a_cosine() -> None:
    learner = build(momentum=0.9)
    for step, wanted in ((0, 0.9), (10, 0.95), (20, 1.0)):
        learner.begin_step(step)
        assert learner.momentum == pytest.approx(wanted)
    learner.begin_step(10)
    move_weights(learner)
    names = [name for name, _ in learner.encoder.named_parameters()]
    before = {name: p.clone() for name, p in learner.exported_encoder().named_parameters()}
    learner.end_step()
    after = dict(learner.exported_encoder().named_parameters())
    for name in names:
        wanted_weight = 0.95 * before[name] + 0.05 * learner.encoder.get_parameter(name)
        torch.testing.assert_close(after[name], wanted_weight)
    constant = build(momentum=0.99, momentum_end=0.99)
    constant.begin_step(13)
    assert constant.momentum == pytest.approx(0.99)


def test_exported_network_is_the_teacher_or_the_student() -> None:
    teacher, student = build(), build(exported="student")
    assert teacher.exported_encoder() is teacher.teacher_encoder.network
    assert student.exported_encoder() is student.encoder


@pytest.mark.parametrize("centering", ["mean", "sinkhorn_knopp"])
@pytest.mark.parametrize("workers", ["pool", "pool3"])
def test_steps_on_workers_equal_those_on_one(workers: str, centering: str, request: pytest.FixtureRequest) -> None:
    """After three steps the centre and the teacher's statistics are equal too."""
    pool: Pool = request.getfixturevalue(workers)
    builder = partial(build, norm="sync", centering=centering, koleo=0.1)
    one = assert_workers_equal_one(pool, builder, *(crops(turn=turn) for turn in range(3)), epoch=1)
    assert bool(one.buffers["center.value"].any()) == (centering == "mean")


@pytest.mark.parametrize(("centering", "patch_head"), [("mean", "shared"), ("sinkhorn_knopp", "own")])
@pytest.mark.parametrize("workers", ["pool", "pool3"])
def test_patch_loss_on_workers_equals_that_on_one(
    workers: str, centering: str, patch_head: str, request: pytest.FixtureRequest
) -> None:
    pool: Pool = request.getfixturevalue(workers)
    builder = partial(build_vit, local_views=0, centering=centering, patch_head=patch_head)
    batches = [crops(12, 16, 0, turn=turn) for turn in range(2)]
    one = assert_workers_equal_one(pool, builder, *batches, epoch=0)
    assert bool(one.gradients["mask_token"].any())
    assert not one.gradients["head.prototypes.direction"].any()


@pytest.mark.parametrize("centering", ["mean", "sinkhorn_knopp"])
def test_batch_in_parts_has_the_loss_and_gradient_of_the_whole(centering: str) -> None:
    assert_parts_equal_whole(build(centering=centering), build(centering=centering), crops(), 4)
    whole, parted = (build_vit(local_views=0, centering=centering, patch_head="own") for _ in range(2))
    for learner in (whole, parted):
        learner.begin_epoch(2)
        for parameter in learner.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
    assert_parts_equal_whole(whole, parted, crops(6, 16, 0), 2)


@pytest.mark.parametrize(("pool", "size"), [(None, 64), ("avg", 64), ("cls", 64), ("cls_avg", 128)])
def test_pooling_is_the_class_token_where_there_is_one(pool: Any, size: int) -> None:
    learner = build_vit(pool=pool, patch_head="own")
    assert learner.head.layers[0].in_features == size
    assert learner.pool == (pool or "cls")
    assert torch.isfinite(learner(crops(4, 16))["loss"])
    assert build().pool == "avg"


def test_batches_have_two_large_views_and_the_small_ones() -> None:
    assert batch_requirements("dino", {"local_views": 3}) == BatchRequirements(views=5)
    groups = Dino.default_views(({"op": "center_crop"},), 64, {"local_views": 3})
    assert [(group.count, group.size) for group in groups] == [(1, 64), (1, 64), (3, 32)]
    assert sum(group.count for group in Dino.default_views(({"op": "center_crop"},), 64, {"local_views": 0})) == 2


def test_constant_and_equal_images_have_finite_losses() -> None:
    for pixels in (torch.zeros(6, 3, 16, 16), torch.rand(1, 3, 16, 16).expand(6, -1, -1, -1)):
        learner = build_vit(local_views=0).float()
        losses = learner(batch_of_images((pixels, pixels)))
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"])
        assert all(torch.isfinite(p.grad).all() for p in learner.parameters() if p.grad is not None)


def test_losses_are_in_single_precision_under_autocast() -> None:
    learner = build_vit().float()
    batch = crops(4, 16)
    batch = Batch(batch.ids, batch.rows, batch.labels, tuple(v.float() for v in batch.views), batch.passes)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = learner.embed(batch)
        losses = learner.loss(outputs, batch)
    assert {output.dtype for output in outputs} == {torch.float32}
    assert {value.dtype for value in losses.values()} == {torch.float32}
    losses["loss"].backward()
    assert learner.mask_token.grad is not None


def test_collapse_shows_in_the_entropy_of_the_targets() -> None:
    learner, batch = build(), crops()
    spread = float(learner(batch)["target_entropy"])
    with torch.no_grad():
        learner.teacher_head.network.prototypes.direction.copy_(torch.ones(10, 5))  # type: ignore[operator, union-attr]
    assert float(learner(batch)["target_entropy"]) == pytest.approx(torch.tensor(10.0).log().item(), rel=1e-6)
    assert spread < 2.0


def test_pictures_are_the_attention_of_the_exported_network() -> None:
    learner, images = build_vit().float().eval(), image_batch(torch.arange(3), size=16)
    (grid,) = learner.image_grids(images, "test images")
    with torch.no_grad():
        for parameter in learner.encoder.parameters():
            parameter.add_(1.0)
    assert torch.equal(learner.image_grids(images)[0].rows[1].maps, grid.rows[1].maps)  # type: ignore[arg-type]
    assert "test images" in grid.title
    assert build().eval().image_grids(crops()) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_loss": 1.0}, r"^patch_loss: 1 needs one ViT with a class token, which convnet is not; valid: 0$"),
        ({"pool": "cls"}, r"^pool: 'cls' needs a class token, and convnet has none"),
        ({"mask_ratio": (0.5, 0.1)}, r"^mask_ratio: \[0.5, 0.1\] does not rise; valid: the smaller share first$"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_shared_head_of_larger_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^patch_head: shared is not valid with pool: cls_avg.*; valid: own$"):
        build_vit(pool="cls_avg")


def test_two_towers_have_no_patch_loss() -> None:
    with pytest.raises(ValueError, match=r"^patch_loss: 1 needs one ViT with a class token, which test_vit is not"):
        Dino(Encoder({**VIT, "input": "rgb_sobel"}, 16), INFO, patch_loss=1.0)
