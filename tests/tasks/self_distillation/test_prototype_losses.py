"""Losses of self-distillation against naive versions, and against lightly's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.self_distillation.centering import sharpen_centred
from firstlight.tasks.self_distillation.prototype_losses import cross_view_loss, koleo_loss, masked_patch_loss
from tests.support import references_dino
from tests.support.gloo import Pool

STUDENT, TEACHER = 0.1, 0.05


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("images", "views", "prototypes"), [(1, 2, 2), (4, 2, 7), (3, 5, 6), (5, 10, 3)])
def test_cross_view_loss_is_that_of_the_paper(images: int, views: int, prototypes: int) -> None:
    student, teacher, center = draw(images, views, prototypes), draw(images, 2, prototypes, seed=1), draw(prototypes)
    found = cross_view_loss(sharpen_centred(teacher, center, TEACHER), student, STUDENT)
    wanted = references_dino.dino_loss(student.transpose(0, 1), teacher.transpose(0, 1), center, STUDENT, TEACHER)
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_cross_view_loss_is_lightlys() -> None:
    """With a temperature given, and the centre that lightly's begins with."""
    loss = pytest.importorskip("lightly.loss").DINOLoss(output_dim=7, student_temp=STUDENT)
    student, teacher = draw(4, 6, 7), draw(4, 2, 7, seed=1)
    center = draw(7)
    loss.center = center[None, None]
    wanted = loss(list(teacher.unbind(1)), list(student.unbind(1)), teacher_temp=TEACHER)
    found = cross_view_loss(sharpen_centred(teacher, center, TEACHER), student, STUDENT)
    # It holds the temperature in single precision.
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_gradcheck_of_the_cross_view_loss() -> None:
    targets = draw(3, 2, 5).softmax(-1)
    logits = draw(3, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_view_loss(targets, x, 0.5), logits)


def masked(images: int, tokens: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Masks (2, B, N) of two views, one of them empty, and the weights (B, 2 N) of their tokens."""
    mask = torch.rand(2, images, tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[1, 0] = False
    weights = mask.double() / mask.sum(2, keepdim=True).clamp_min(1) / 2
    return mask, torch.cat(tuple(weights), 1)


@pytest.mark.parametrize(("images", "tokens", "prototypes"), [(1, 4, 3), (3, 6, 5), (4, 9, 2)])
def test_patch_loss_is_that_of_ibot(images: int, tokens: int, prototypes: int) -> None:
    mask, weights = masked(images, tokens)
    student, teacher = (draw(2, images, tokens, prototypes, seed=seed) for seed in (1, 2))
    center = draw(prototypes)
    targets = sharpen_centred(torch.cat(tuple(teacher), 1), center, TEACHER)
    found = masked_patch_loss(targets, torch.cat(tuple(student), 1), weights, STUDENT)
    wanted = references_dino.ibot_loss(student, teacher, mask, center, STUDENT, TEACHER)
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_patch_loss_is_lightlys() -> None:
    """Lightly's has the masked tokens of one call: both views are images of it, with twice the weight of a view."""
    loss = pytest.importorskip("lightly.loss").IBOTPatchLoss(output_dim=5, teacher_temp=TEACHER, student_temp=STUDENT)
    mask, weights = masked(3, 6)
    student, teacher = (draw(2, 3, 6, 5, seed=seed) for seed in (1, 2))
    center = draw(5)
    loss.center.center = center[None]
    flat = mask.flatten(0, 1)
    chosen = [x.flatten(0, 1)[flat] for x in (teacher, student)]
    wanted = loss(*chosen, flat.unflatten(1, (2, 3)))
    targets = sharpen_centred(torch.cat(tuple(teacher), 1), center, TEACHER)
    found = masked_patch_loss(targets, torch.cat(tuple(student), 1), weights, STUDENT)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_gradcheck_of_the_patch_loss() -> None:
    _, weights = masked(2, 4)
    targets, logits = draw(2, 8, 3).softmax(-1), draw(2, 8, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: masked_patch_loss(targets, x, weights, 0.5), logits)


@pytest.mark.parametrize(("images", "size"), [(2, 3), (5, 4), (9, 2)])
def test_koleo_is_that_of_the_paper_and_lightlys(images: int, size: int) -> None:
    features = draw(images, size)
    found = float(koleo_loss(features))
    assert found == pytest.approx(references_dino.koleo_loss(features), rel=1e-6)
    assert found == pytest.approx(float(pytest.importorskip("lightly.loss").KoLeoLoss()(features)), rel=1e-12)


def test_gradcheck_of_koleo() -> None:
    assert torch.autograd.gradcheck(koleo_loss, draw(5, 3).requires_grad_())


def test_koleo_of_equal_images_is_finite() -> None:
    features = draw(1, 4).expand(6, -1).clone().requires_grad_()
    loss = koleo_loss(features)
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def compute_koleo(features: Tensor) -> tuple[float, Tensor]:
    """The loss of this worker's part, and the mean over workers of the gradient in a parameter that all share."""
    scale = torch.ones(features.shape[1], dtype=torch.float64, requires_grad=True)
    size = len(features) // world_size()
    loss = koleo_loss(features[rank() * size : (rank() + 1) * size] * scale)
    loss.backward()
    assert scale.grad is not None
    return float(loss.detach()), scale.grad


@pytest.mark.parametrize("workers", ["pool", "pool3"])
def test_koleo_finds_neighbours_of_all_workers(workers: str, request: pytest.FixtureRequest) -> None:
    pool: Pool = request.getfixturevalue(workers)
    features = draw(12, 3)
    loss, gradient = compute_koleo(features)
    answers: list[Any] = pool.run(compute_koleo, features)
    assert sum(answer[0] for answer in answers) / len(answers) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(sum(answer[1] for answer in answers) / len(answers), gradient)


def test_neighbours_are_by_angle_and_not_by_length() -> None:
    features = F.normalize(draw(6, 3), dim=1)
    lengths = torch.tensor([1.0, 5.0, 0.1, 2.0, 9.0, 0.5], dtype=torch.float64)[:, None]
    assert float(koleo_loss(features * lengths)) == pytest.approx(float(koleo_loss(features)), rel=1e-9)
