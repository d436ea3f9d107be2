from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.nn.encoders import Encoder, NetworkSection, pool_maps
from firstlight.tasks.pretrain import METHODS, batch_requirements
from firstlight.tasks.pretrain.distill import Distillation, cosine_distance
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from tests.support import gradient_cache
from tests.support import references_semi as references
from tests.support.batches import image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_encoder, build_method
from tests.support.two_workers import assert_workers_equal_one

batch = partial(image_batch, dtype=torch.float64)

TEACHER: dict[str, Any] = {"name": "convnet", "width": 6, "depth": 2, "norm": "batch"}
SECTION = NetworkSection({**TEACHER, "weights": "teacher.safetensors", "part": None, "licence": None})
VARIANTS: dict[str, dict[str, Any]] = {
    "pooled and maps": {},
    "pooled": {"map_weight": 0.0},
    "another size": {"teacher_size": 12, "map_weight": 0.0},
    "hidden layers": {"hidden": (16,), "map_weight": 0.5},
}


def build_teacher(size: int = 8) -> Encoder:
    """A teacher in double precision, whose normalisations have statistics that are not those of a batch."""
    teacher = build_encoder(TEACHER, size).double()
    for name, buffer in teacher.named_buffers():
        if "running_mean" in name:
            buffer.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    return teacher


def method(norm: str = "group", dtype: torch.dtype = torch.float64, **options: Any) -> Distillation:
    size = options.get("teacher_size") or 8
    info = TrainingInfo(size=96, epochs=3, seed=7, teacher=build_teacher(size))
    return build_method(Distillation, info, {"norm": norm}, dtype=dtype, teacher=SECTION, norm="group", **options)


def vectors(maps: Tensor) -> list[list[float]]:
    """The vectors of all images and positions."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1).tolist() if maps.ndim == 4 else maps.tolist()


@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (2, 3, 2, 4)])
def test_distance_is_one_minus_the_cosine_over_images_and_positions(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = list(zip(vectors(first), vectors(second), strict=True))
    expected = sum(references.cosine_distance(a, b) for a, b in pairs) / len(pairs)
    assert float(cosine_distance(first, second)) == pytest.approx(expected, rel=1e-12)
    first.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cosine_distance(x, second), (first,))


@pytest.mark.parametrize("weight", [None, 0.3])
def test_the_loss_is_of_pooled_features_and_of_maps(weight: float | None) -> None:
    learner, seen = method(map_weight=weight), batch(12)
    told = learner(seen)
    with torch.no_grad():
        own, other = learner.encoder(seen.views[0]), build_teacher().eval()(seen.views[0])
        pooled = cosine_distance(learner.head(pool_maps(own, "avg")), pool_maps(other, "avg"))
        assert learner.map_head is not None
        of_maps = cosine_distance(learner.map_head(own[-1]), other[-1])
    torch.testing.assert_close(told["feature_distance"].detach(), pooled, rtol=1e-12, atol=0)
    torch.testing.assert_close(told["map_distance"].detach(), of_maps, rtol=1e-12, atol=0)
    factor = 1.0 if weight is None else weight
    torch.testing.assert_close(told["loss"].detach(), pooled + factor * of_maps, rtol=1e-12, atol=0)


def test_teacher_is_in_evaluation_mode_and_no_part_of_the_state() -> None:
    learner = method().train()
    before = {name: tensor.clone() for name, tensor in learner.teacher.state_dict().items()}
    learner(batch(12))["loss"].backward()
    assert not learner.teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in learner.teacher.parameters())
    own = {*learner.encoder.state_dict(prefix="encoder."), *learner.head.state_dict(prefix="head.")}
    assert set(learner.state_dict()) == own | {"map_head.weight", "map_head.bias"}
    trained = set(map(id, learner.parameters()))
    assert not trained & set(map(id, learner.teacher.parameters()))
    assert all(p.grad is not None and bool(p.grad.any()) for p in learner.parameters() if p.requires_grad)


def test_views_are_resized_for_the_teacher_by_antialiased_interpolation() -> None:
    learner, seen = method(teacher_size=12), batch(12)
    assert learner.map_head is None, "the maps have other positions: 2x2 and 3x3"
    resized = F.interpolate(seen.views[0], (12, 12), mode="bilinear", align_corners=False, antialias=True)
    expected = pool_maps(build_teacher(12).eval()(resized), "avg")
    torch.testing.assert_close(learner.embed(seen)[1], expected, rtol=1e-12, atol=0)
    smaller = method(teacher_size=4).read_teacher(seen.views[0])[0]
    plain = F.interpolate(seen.views[0], (4, 4), mode="bilinear", align_corners=False)
    assert not torch.allclose(smaller, pool_maps(build_teacher(4).eval()(plain), "avg"))


def test_a_vit_teaches_with_its_class_token() -> None:
    vit = Encoder({"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}, 32)
    student = build_encoder({"norm": "group"}, 32)
    info = TrainingInfo(size=8, epochs=1, seed=0, teacher=vit)
    learner = Distillation(student, info, teacher=NetworkSection({"name": "timm"}), teacher_pool="cls", norm="group")
    seen = image_batch(torch.arange(4), size=32)
    maps: Any = vit.eval()(seen.views[0])
    torch.testing.assert_close(learner.embed(seen)[1], maps.class_tokens[-1])
    learner(seen)["loss"].backward()
    with pytest.raises(ValueError, match=r"^teacher_pool: 'cls' needs a class token, and convnet has none"):
        method(teacher_pool="cls")


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ({**TEACHER, "name": "network1", "m": (0, 0, 0, 0)}, {}, r"^teacher\.m: \[0, 0, 0, 0\] leaves no convolution"),
        ({**TEACHER, "depth": 6}, {}, r"^teacher: images of 8 pixels are too small for convnet"),
        (TEACHER, {"teacher_size": 16, "map_weight": 1.0}, r"^map_weight: 1 is not valid: .* 2x2 positions, .* 4x4"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(section: dict[str, Any], options: dict[str, Any], message: str) -> None:
    if section["name"] == "network1":
        section = {"name": "network1", "m": [0, 0, 0, 0]}
    with pytest.raises(ValueError, match=message):
        Distillation(
            build_encoder({}, 8), TrainingInfo(size=8, epochs=1, seed=0), teacher=NetworkSection(section), **options
        )


def test_no_label_is_needed() -> None:
    assert METHODS["distill"] is Distillation
    assert batch_requirements("distill", {}) == BatchRequirements(views=1)


def test_the_step_is_in_single_precision_under_autocast() -> None:
    learner = method(dtype=torch.float32)
    learner.teacher.float()
    with torch.autocast("cpu", torch.bfloat16):
        told = learner(batch(12, dtype=torch.float32))
    assert {value.dtype for value in told.values()} == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_embedded_in_parts_has_gradient_of_whole(variant: str) -> None:
    gradient_cache.assert_parts_equal_whole(method(**VARIANTS[variant]), method(**VARIANTS[variant]), batch(12), 4)


@pytest.mark.parametrize("variant", ["pooled and maps", "another size"])
@pytest.mark.parametrize(("workers", "norm"), [("pool", "sync"), ("pool3", "group")])
def test_workers_equal_one(request: pytest.FixtureRequest, workers: str, norm: str, variant: str) -> None:
    pool: Pool = request.getfixturevalue(workers)
    one = assert_workers_equal_one(pool, partial(method, norm, **VARIANTS[variant]), batch(24), batch(24))
    assert all(gradient.abs().sum() > 0 for gradient in one.gradients.values())
