import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.tasks.counter_rng import derive_keys
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import batch_requirements
from firstlight.tasks.pretrain.method import TrainingInfo
from firstlight.tasks.pretrain.spatial_contrasting import (
    SpatialContrasting,
    contrast_loss,
    cut_patches,
    draw_corners,
    patch_distances,
)
from tests.support import gradient_cache, references
from tests.support.batches import batch_of_images, image_batch, unevenly_labelled
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.two_workers import assert_workers_equal_one

batch = partial(image_batch, dtype=torch.float64, labels=unevenly_labelled)

SMALL: dict[str, Any] = {"patch_size": 2, "layers": (0,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": SMALL,
    "eq1": {**SMALL, "contrast": "eq1"},
    "three patches, symmetric": {**SMALL, "patches": 3, "symmetric": True, "patch_features": "avg"},
    "two layers": {"patch_size": 2, "layers": (0, -1)},
    "pixels": {"level": "pixel", "patch_size": 5},
    "supervised": {**SMALL, "supervised_weight": 0.5},
    "pixels, supervised": {"level": "pixel", "patch_size": 5, "supervised_weight": 0.5},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method(
    norm: str = "group", dtype: torch.dtype = torch.float64, classes: int = 5, seed: int = 7, **options: Any
) -> SpatialContrasting:
    """The method on an encoder with maps of 4 x 4 and 2 x 2 positions."""
    info = TrainingInfo(size=96, epochs=3, seed=seed, classes=classes)
    return build_method(SpatialContrasting, info, {"norm": norm}, dtype=dtype, **options)


@pytest.mark.parametrize("contrast", ["eq2", "eq1"])
def test_loss_is_the_papers_formula(contrast: str) -> None:
    first, second = normal(7, 5), normal(7, 5, seed=1)
    loss, _ = contrast_loss(first, second, second if contrast == "eq2" else first)
    assert float(loss) == pytest.approx(references.spatial_contrast(first, second, contrast), rel=1e-10)


def test_loss_of_two_images_is_equation_1() -> None:
    """The term of image 1 has its positive, and patch 1 of image 2 as the contrast."""
    f, g = normal(2, 4), normal(2, 4, seed=1)  # patches 1 and 2
    near, far = (f[0] - g[0]).norm(), (f[0] - f[1]).norm()
    expected = -torch.log(torch.exp(-near) / (torch.exp(-near) + torch.exp(-far)))
    term = torch.nn.functional.cross_entropy(-patch_distances(f, g, f)[:1], torch.tensor([0]))
    assert float(term) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("contrast", ["eq2", "eq1"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pairs_directions_and_layers(contrast: str, symmetric: bool) -> None:
    """The loss is the mean over all pairs a < b of patches, in both directions if symmetric; layers are added."""
    learner = method(patches=3, symmetric=symmetric, contrast=contrast, layers=(1, 0), patch_size=2)
    outputs = normal(6, 3, 4), normal(6, 3, 9, seed=1)
    expected = 0.0
    for features in outputs:
        terms = []
        for a, b in itertools.combinations(range(3), 2):
            terms.append(references.spatial_contrast(features[:, a], features[:, b], contrast))
            if symmetric:
                terms.append(references.spatial_contrast(features[:, b], features[:, a], contrast))
        expected += sum(terms) / len(terms)
    assert float(learner.loss(outputs, batch(torch.arange(6)))["loss"]) == pytest.approx(expected, rel=1e-10)


def test_symmetric_loss_does_not_depend_on_the_order_of_patches() -> None:
    b, outputs = batch(torch.arange(6)), normal(6, 2, 4)
    swapped = outputs.flip(1)
    symmetric, one_way = method(**SMALL, symmetric=True), method(**SMALL)
    assert float(symmetric.loss((outputs,), b)["loss"]) == pytest.approx(
        float(symmetric.loss((swapped,), b)["loss"]), rel=1e-12
    )
    assert float(one_way.loss((outputs,), b)["loss"]) != pytest.approx(
        float(one_way.loss((swapped,), b)["loss"]), rel=1e-3
    )


def test_accuracy_is_share_of_anchors_nearest_to_their_positive() -> None:
    first = torch.tensor([[0.0], [10.0], [20.0], [30.0]])
    second = torch.tensor([[1.0], [11.0], [31.0], [29.5]])  # the third is nearer to others
    assert float(contrast_loss(first, second, second)[1]) == 0.75


@pytest.mark.parametrize("contrast", ["eq2", "eq1"])
def test_gradcheck(contrast: str) -> None:
    first, second = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return contrast_loss(a, b, b if contrast == "eq2" else a)[0]

    assert torch.autograd.gradcheck(loss, (first, second))


@pytest.mark.parametrize("contrast", ["eq2", "eq1"])
def test_contrasting_patches_get_gradients(contrast: str) -> None:
    learner, b, features = method(**SMALL, contrast=contrast), batch(torch.arange(4)), normal(4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: learner.loss((x,), b)["loss"], (features,))


def test_distance_0_is_exact_with_gradient_0() -> None:
    a = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    apart = patch_distances(a, a, a)
    assert torch.equal(apart, torch.zeros(3, 3, dtype=torch.float64))
    apart.sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))  # type: ignore[arg-type]


def test_near_positives_are_exact_in_single_precision_also_under_autocast() -> None:
    """Far from the origin |a|^2 + |b|^2 - 2 a.b has no digits left."""
    a = (normal(16, 32) + 50.0).float()
    b = a + 1e-3 * normal(16, 32, seed=1).float()
    exact = (a.double() - b.double()).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = patch_distances(a, b, b)
    torch.testing.assert_close(found.diagonal().double(), exact, rtol=1e-6, atol=0)
    off = ~torch.eye(16, dtype=torch.bool)
    torch.testing.assert_close(found[off].double(), torch.cdist(a.double(), b.double())[off], rtol=1e-4, atol=0)


@given(st.integers(1, 400))
def test_largest_uniform_number_is_a_valid_position(places: int) -> None:
    largest = torch.tensor(1.0 - 2.0**-24)
    assert int((largest * places).long()) == places - 1


def test_patch_positions_are_uniform() -> None:
    places = draw_corners(derive_keys(0, torch.zeros(24_000).long(), torch.arange(24_000), 1), 2, 3, 4)
    for patch in range(2):
        counts = torch.bincount(places[:, patch, 0] * 4 + places[:, patch, 1], minlength=12)
        assert len(counts) == 12
        assert ((counts - 2000).abs() < 220).all(), "five standard deviations"
    joint = torch.bincount(places[:, 0, 0] * 3 + places[:, 1, 0], minlength=9)
    assert ((joint - 24_000 / 9).abs() < 250).all(), "the two patches are independent"


def test_every_valid_patch_position_is_drawn() -> None:
    learner = method(**SMALL)
    places = torch.arange(20.0).view(1, 1, 4, 5).expand(600, -1, -1, -1)
    patches = learner._cut_patches(places, batch(torch.arange(600)), 3)
    assert set(patches[:, :, 0, 0, 0].flatten().tolist()) == {5.0 * y + x for y in range(3) for x in range(4)}


@given(st.integers(1, 4), st.integers(0, 1000))
def test_patches_are_cut_where_the_corners_say(side: int, seed: int) -> None:
    maps, places = (
        normal(3, 2, 4, 6, seed=seed),
        draw_corners(derive_keys(seed, torch.zeros(3).long(), torch.arange(3), 0), 2, 4 - side + 1, 6 - side + 1),
    )
    patches = cut_patches(maps, places, side)
    assert patches.shape == (3, 2, 2, side, side)
    for i, p in itertools.product(range(3), range(2)):
        y, x = places[i, p].tolist()
        assert torch.equal(patches[i, p], maps[i, :, y : y + side, x : x + side])


@pytest.mark.parametrize("variant", ["paper", "pixels"])
def test_patch_positions_depend_on_seed_pass_and_id_only(variant: str) -> None:
    def features(ids: list[int], turn: int = 0, seed: int = 7) -> Tensor:
        return method(seed=seed, **VARIANTS[variant]).embed(batch(torch.tensor(ids), turn=turn))[0]

    ids = list(range(12))
    together = features(ids)
    torch.testing.assert_close(features(ids[::-1]), together.flip(0))
    torch.testing.assert_close(features(ids[4:]), together[4:])
    assert not torch.allclose(features(ids, turn=1), together)
    assert not torch.allclose(features(ids, seed=8), together)
    both = batch(torch.tensor(ids))
    both.passes[6:] = 1  # some of the batch are back already
    mixed = method(**VARIANTS[variant]).embed(both)[0]
    torch.testing.assert_close(mixed, torch.cat((together[:6], features(ids, turn=1)[6:])), rtol=0, atol=0)


def test_compared_features_are_patches_of_maps_or_maps_of_patches() -> None:
    """`feature` cuts patches out of the maps of whole images, `pixel` takes the map of a patch.

    The test takes patches that have only one position.
    """
    b = batch(torch.arange(4))
    whole = method(**SMALL).encoder(b.views[0])
    for options, expected in (
        ({"layers": (0,), "patch_size": 4}, whole[0].flatten(1)),
        ({"layers": (-2,), "patch_size": 4, "patch_features": "avg"}, whole[0].mean((2, 3))),
        ({"layers": (-1,), "patch_size": 2}, whole[1].flatten(1)),
        ({"level": "pixel", "patch_size": 8, "patch_features": "avg"}, whole[1].mean((2, 3))),
        ({"level": "pixel", "patch_size": 8}, whole[1].flatten(1)),
    ):
        (features,) = method(**options).embed(b)
        for patch in range(2):
            torch.testing.assert_close(features[:, patch], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_does_not_depend_on_the_order_of_the_batch(variant: str) -> None:
    learner, ids = method(**VARIANTS[variant]), torch.arange(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert float(learner(batch(ids[order]))["loss"].detach()) == pytest.approx(
        float(learner(batch(ids))["loss"].detach()), rel=1e-10
    )


@pytest.mark.fault(38, "zeros, equal images, huge values: Spatial Contrasting")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("images", ["constant", "equal"])
def test_constant_and_equal_images_have_finite_losses(variant: str, images: str) -> None:
    learner = method(dtype=torch.float32, **VARIANTS[variant])
    pixels = torch.zeros(8, 3, 8, 8) if images == "constant" else torch.rand(1, 3, 8, 8).expand(8, -1, -1, -1)
    losses = learner(batch_of_images(pixels))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    for name, p in learner.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or torch.isfinite(p.grad).all(), name


def test_the_step_is_in_single_precision_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        learner = method(dtype=torch.float32, **VARIANTS["supervised"])
        losses = learner(batch(torch.arange(12), dtype=torch.float32))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("input", ["rgb", "rgb_sobel"])
@pytest.mark.parametrize("options", [SMALL, {"level": "pixel", "patch_size": 5, "layers": (0,)}])
def test_parameters_of_unused_layers_are_frozen(input: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = Encoder({"name": "convnet", "norm": "group", "width": 4, "depth": 2, "input": input}, 8)
    learner = SpatialContrasting(encoder, TrainingInfo(size=96, epochs=3, seed=7), **options)
    assert encoder.training
    for name, module in encoder.named_modules():
        if name.endswith("stages.1"):
            module.register_forward_hook(lambda *_: pytest.fail("a stage too many is computed"))
    learner(batch(torch.arange(8), dtype=torch.float32))["loss"].backward()
    for name, p in encoder.named_parameters():
        assert p.requires_grad == ("stages.0." in name), name
        assert (p.grad is not None) == p.requires_grad


def test_with_a_classifier_or_the_last_map_everything_is_learned() -> None:
    assert all(p.requires_grad for p in method(**VARIANTS["supervised"]).parameters())
    assert all(p.requires_grad for p in method(layers=(-1,), patch_size=1).parameters())
    assert all(p.requires_grad for p in method(**VARIANTS["pixels"]).parameters())


def test_the_supervised_loss_is_added() -> None:
    b, learner = batch(torch.arange(12)), method(**VARIANTS["supervised"])
    losses = {name: float(value.detach()) for name, value in learner(b).items()}
    logits = learner.classifier(learner.encoder(b.views[0])[-1].mean((2, 3))).detach()
    assert losses["supervised_loss"] == pytest.approx(
        references.labelled_cross_entropy(logits.softmax(1), b.labels.tolist()), rel=1e-10
    )
    assert losses["contrast_loss"] == pytest.approx(float(method(**SMALL)(b)["loss"].detach()), rel=1e-10)
    assert losses["loss"] == pytest.approx(losses["contrast_loss"] + 0.5 * losses["supervised_loss"], rel=1e-12)


def test_labels_are_required_only_for_the_supervised_loss() -> None:
    assert not hasattr(method(**SMALL, classes=0), "classifier")
    assert not batch_requirements("spatial_contrasting", SMALL).labels
    assert not batch_requirements("spatial_contrasting", {**SMALL, "supervised_weight": 0.0}).labels
    assert batch_requirements("spatial_contrasting", VARIANTS["supervised"]).labels
    first, second = batch(torch.arange(12)), batch(torch.arange(12))
    second.labels.zero_()
    assert torch.equal(method(**SMALL)(first)["loss"], method(**SMALL)(second)["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (2,), "patch_size": 1}, r"^layers: \[2\] .* 0\.\.1 or -2\.\.-1"),
        ({"layers": (-3,), "patch_size": 1}, r"^layers: \[-3\]"),
        ({"layers": (), "patch_size": 1}, r"^layers: \[\]"),
        ({"layers": (1, -1), "patch_size": 1}, r"^layers: \[1, -1\] names a map twice"),
        ({"layers": (0, 1), "patch_size": 3}, r"^patch_size: 3 is larger than map 1 of the encoder, .*2x2 positions"),
        ({"level": "pixel", "patch_size": 9}, r"^patch_size: 9 pixels"),
        ({"level": "pixel", "patch_size": 3}, r"^patch_size: 3 pixels are too small for the encoder"),
        ({"layers": (0,), "supervised_weight": 1.0, "classes": 0}, r"^supervised_weight: 1 needs labels"),
    ],
)
def test_wrong_parameters_raise_with_their_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_embedded_in_parts_has_gradient_of_whole(variant: str) -> None:
    gradient_cache.assert_parts_equal_whole(
        method(**VARIANTS[variant]), method(**VARIANTS[variant]), batch(torch.arange(24)), 8
    )


@pytest.mark.parametrize("norm", ["group", "sync"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("workers", "size"), [("pool", 64), ("pool3", 48)])
def test_workers_equal_one(request: pytest.FixtureRequest, workers: str, size: int, variant: str, norm: str) -> None:
    pool: Pool = request.getfixturevalue(workers)
    info, options = TrainingInfo(size=96, epochs=3, seed=7, classes=5), VARIANTS[variant]
    build = partial(build_method, SpatialContrasting, info, {"norm": norm}, dtype=torch.float64, **options)
    one = assert_workers_equal_one(pool, build, batch(torch.arange(size), turn=2), loss_rtol=1e-8, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in one.gradients.values())
