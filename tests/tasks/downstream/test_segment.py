import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.downstream.segment import (
    MirrorHead,
    Segmentation,
    confusion_counts,
    merge_windows,
    overlay_classes,
    voc_palette,
)
from firstlight.tasks.downstream.whole_images import VOID_CLASS
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from tests.support.batches import batch_of_images, mask_batch
from tests.support.gloo import Pool
from tests.support.learners import build_task
from tests.support.two_workers import assert_workers_equal_one


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder({"name": "network1", "norm": "group", "m": [2, 2, 0, 0], "width": 4}, 13)


def task(dtype: torch.dtype = torch.float32, **options: Any) -> Segmentation:
    return build_task(Segmentation, encoder(), 3, dtype, norm="group", **options)


@pytest.mark.parametrize("head", ["mirror", "fcn", "deeplab"])
def test_every_pixel_gets_a_class(head: str) -> None:
    learner = task(head=head)
    assert learner.compute_logits(mask_batch().views[0]).shape == (6, 3, 13, 13)
    learner(mask_batch())["loss"].backward()
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)
    assert set(learner.eval().draw_predictions(mask_batch())) == {"image", "truth", "predicted"}


def test_the_loss_is_cross_entropy_over_the_pixels_that_are_not_void() -> None:
    learner, b = task(), mask_batch()
    losses, logits = learner(b), learner.compute_logits(b.views[0]).detach().double()
    total, hits, count = 0.0, 0, 0
    for i, y, x in ((i, y, x) for i in range(6) for y in range(13) for x in range(13)):
        truth = int(b.targets["mask"][i, y, x])
        if truth != VOID_CLASS:
            total -= float(F.log_softmax(logits[i, :, y, x], 0)[truth])
            hits += int(logits[i, :, y, x].argmax()) == truth
            count += 1
    assert float(losses["loss"].detach()) == pytest.approx(total / count, rel=1e-5)
    assert float(losses["pixel_accuracy"]) == pytest.approx(hits / count)


def test_mask_of_void_only_has_loss_0() -> None:
    b = mask_batch()
    b.targets["mask"][:] = VOID_CLASS
    losses = task()(b)
    losses["loss"].backward()
    assert float(losses["loss"].detach()) == 0.0


def test_two_workers_equal_one(pool: Pool) -> None:
    one = assert_workers_equal_one(pool, partial(task, torch.float64), mask_batch(dtype=torch.float64))
    assert one.gradients


def test_confusion_and_scores_are_those_of_counting() -> None:
    learner, b = task(), mask_batch()
    predicted, mask = learner.eval().compute_logits(b.views[0]).argmax(1), b.targets["mask"].long()
    counts = confusion_counts(predicted, mask, 3)
    for i in range(6):
        for truth in range(3):
            for guess in range(3):
                assert int(counts[i, truth, guess]) == int(((mask[i] == truth) & (predicted[i] == guess)).sum())
    ious = []
    for c in range(3):
        union = ((mask == c) | (predicted == c)) & (mask != VOID_CLASS)
        ious.append(float(((mask == c) & (predicted == c)).sum() / union.sum()))
    scores = learner.score(learner.observe(b))
    assert scores["iou"] == pytest.approx(ious)
    assert scores["mean_iou"] == pytest.approx(sum(ious) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(float((predicted == mask).sum() / (mask != VOID_CLASS).sum()))


def test_mean_iou_is_that_of_torchmetrics() -> None:
    from torchmetrics.segmentation import MeanIoU

    rng = torch.Generator().manual_seed(1)
    predicted, mask = torch.randint(3, (4, 9, 9), generator=rng), torch.randint(3, (4, 9, 9), generator=rng)
    scores = task().score((confusion_counts(predicted, mask, 3),))
    metric = MeanIoU(num_classes=3, input_format="index")
    metric.update(
        predicted.reshape(1, -1, 9), mask.reshape(1, -1, 9)
    )  # one image: pixels of all images together, as VOC counts
    assert scores["mean_iou"] == pytest.approx(float(metric.compute()))


@pytest.mark.parametrize(
    ("predicted", "mean"), [([0, 0, 1, 1], 1.0), ([0, 2, 1, 2], 0.75), ([2, 2, 2, 2], 0.0), ([0, 0, 0, 0], 1 / 3)]
)
def test_absent_class_is_not_in_mean_iou(predicted: list[int], mean: float) -> None:
    """Also where it is predicted: then it costs the classes that are there."""
    mask = torch.tensor([[[0, 0, 1, VOID_CLASS]]])
    scores = task().score((confusion_counts(torch.tensor([[predicted]]), mask, 3),))
    assert scores["mean_iou"] == pytest.approx(mean)
    iou = scores["iou"]
    assert isinstance(iou, list)
    assert math.isnan(iou[2])


@pytest.mark.parametrize("mask", [[VOID_CLASS] * 4, [1, 1, 1, VOID_CLASS], [0, 0, 0, 0]])
def test_masks_of_fewer_than_two_classes_give_no_score(mask: list[int]) -> None:
    """A network that gives the same class everywhere would be perfect, or there is nothing to count."""
    masks = torch.tensor([[mask]])
    scores = task().score((confusion_counts(masks.clamp_max(2), masks, 3),))
    assert math.isnan(scores["mean_iou"])  # type: ignore[arg-type]
    assert math.isnan(scores["pixel_accuracy"]) == (mask[0] == VOID_CLASS)  # type: ignore[arg-type]


def test_pretrained_decoder_is_copied_except_the_last_layer() -> None:
    learner, pretrained = task(), Decoder(encoder().shapes, 3, 13, norm="group")
    for p in pretrained.parameters():
        nn.init.normal_(p)
    last = {k: v.clone() for k, v in learner.state_dict().items() if ".last." in k}
    learner.start_from({"decoder": pretrained})
    assert isinstance(learner.head, MirrorHead)
    mine = learner.head.decoder.state_dict()
    assert last
    assert all(torch.equal(mine[k], v) for k, v in pretrained.state_dict().items() if not k.startswith("last."))
    assert all(torch.equal(learner.state_dict()[k], v) for k, v in last.items())


@pytest.mark.fault(47, "a decoder of another network")
def test_other_decoder_raises_with_the_key_that_differs() -> None:
    with pytest.raises(ValueError, match="shortcuts: full differs from input_output"):
        task().start_from({"decoder": Decoder(encoder().shapes, 3, 13, norm="group", shortcuts="input_output")})
    with pytest.raises(ValueError, match="head: only 'mirror'"):
        task(head="fcn").start_from({"decoder": Decoder(encoder().shapes, 3, 13, norm="group")})
    with pytest.raises(ValueError, match="no pretrained decoder"):
        task().start_from({})


def test_segmentation_learns_two_halves() -> None:
    rng = torch.Generator().manual_seed(0)
    images, mask = torch.rand(8, 3, 13, 13, generator=rng) * 0.3, torch.zeros(8, 13, 13, dtype=torch.uint8)
    images[:, :, :, 7:] += 0.7
    mask[:, :, 7:] = 1
    b = batch_of_images(images, {"mask": mask})
    learner = task().train()
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        learner(b)["loss"].backward()
        optimizer.step()
    score = learner.eval().score(learner.observe(b))["mean_iou"]
    assert isinstance(score, float)
    assert score > 0.9


def test_the_palette_is_vocs() -> None:
    expected = [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
    ]
    assert [tuple(row) for row in (voc_palette(9) * 255).round().int().tolist()] == expected
    image = torch.rand(1, 3, 1, 2)
    painted = overlay_classes(image, torch.tensor([[[1, VOID_CLASS]]]))
    assert torch.equal(painted[..., 1], image[..., 1])
    assert not torch.equal(painted[..., 0], image[..., 0])


def test_black_bars_of_an_image_change_no_prediction() -> None:
    """An image on black is normalised without the bars, so that what is there does not matter."""
    torch.manual_seed(0)
    spec = {"name": "network1", "norm": "group", "m": [2, 2, 0, 0], "width": 4, "normalize": "image"}
    learner, b = Segmentation(Encoder(spec, 13), 3, norm="group"), mask_batch()
    region = torch.tensor([0.0, 3.0, 13.0, 10.0]).expand(6, 4)
    views = [b.views[0].clone() for _ in range(2)]
    for view, value in zip(views, (0.0, 1.0), strict=True):
        view[:, :, :3], view[:, :, 10:] = value, value
    black, white = (batch_of_images(view, {**b.targets, "region": region}) for view in views)
    assert torch.equal(learner.embed(black)[0], learner.embed(white)[0])
    assert torch.equal(learner.eval().observe(black)[0], learner.observe(white)[0])
    shown = [learner.draw_predictions(batch)["predicted"][:, :, 3:10] for batch in (black, white)]
    assert torch.equal(*shown)
    assert not torch.equal(*(learner.compute_logits(view) for view in views)), "as part of the image they do"


@pytest.mark.parametrize("head", ["fcn", "deeplab"])
def test_heads_of_torchvision_are_drawn_as_init_says(head: str) -> None:
    layers = [module for module in task(head=head, init="gaussian").head.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) > 1
    drawn = torch.cat([layer.weight.detach().flatten() for layer in layers])
    assert float(drawn.std()) == pytest.approx(0.01, rel=0.2)
    assert float(drawn.abs().max()) < 0.06


def test_merged_windows_are_means_of_linear_interpolations() -> None:
    """Against a loop over pixels, for windows between pixels that overlap."""
    logits = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    windows, (width, height) = [(0.0, 0.0, 9.3, 9.3), (4.7, 0.0, 9.3, 9.3), (4.7, 2.7, 9.3, 9.3)], (14, 12)
    windows.append((0.0, 2.7, 9.3, 9.3))
    logits = torch.cat((logits, logits[:1] + 1))
    found = merge_windows(logits, windows, (width, height))
    assert found.shape == (2, height, width)
    for y in range(height):
        for x in range(width):
            seen = []
            for one, (left, top, side, _) in zip(logits, windows, strict=True):
                u, v = ((place + 0.5 - start) / side * 5 - 0.5 for place, start in ((x, left), (y, top)))
                if -0.5 <= min(u, v) <= max(u, v) <= 4.5:
                    seen.append(interpolate(one, min(max(u, 0.0), 4.0), min(max(v, 0.0), 4.0)))
            assert seen
            torch.testing.assert_close(found[:, y, x], torch.stack(seen).mean(0), rtol=1e-6, atol=1e-6)


def interpolate(maps: Tensor, u: float, v: float) -> Tensor:
    """(C, h, w) -> (C,): the value between four pixels."""
    left, top = min(int(u), maps.shape[2] - 2), min(int(v), maps.shape[1] - 2)
    x, y = u - left, v - top
    upper = maps[:, top, left] * (1 - x) + maps[:, top, left + 1] * x
    return upper * (1 - y) + (maps[:, top + 1, left] * (1 - x) + maps[:, top + 1, left + 1] * x) * y


def test_window_of_the_size_of_the_image_is_its_logits() -> None:
    logits = torch.randn(1, 3, 13, 13)
    torch.testing.assert_close(merge_windows(logits, [(0.0, 0.0, 13.0, 13.0)], (13, 13)), logits[0])


def test_pixels_that_no_window_sees_are_an_error() -> None:
    with pytest.raises(AssertionError, match="windows cover the image"):
        merge_windows(torch.randn(1, 3, 13, 13), [(0.0, 0.0, 13.0, 13.0)], (14, 13))


def test_whole_images_are_counted_at_their_own_size() -> None:
    learner, size = task().eval(), torch.tensor([[20, 13], [13, 13]])
    mask = torch.full((2, 13, 20), VOID_CLASS, dtype=torch.uint8)
    mask[0], mask[1, :, :13], mask[0, 0] = 1, 2, VOID_CLASS
    windows = torch.tensor([[[0.0, 0, 13, 13], [7.0, 0, 13, 13]], [[0.0, 0, 13, 13]] * 2], dtype=torch.float64)
    views = (torch.rand(2, 3, 13, 13), torch.rand(2, 3, 13, 13))
    batch = batch_of_images(views, {"whole_mask": mask, "whole_size": size, "windows": windows})
    (counts,) = learner.observe(batch)
    assert counts.sum(2).tolist() == [[0, 12 * 20, 0], [0, 0, 13 * 13]]
    alone = learner.compute_logits(views[0][1:]).argmax(1)
    assert torch.equal(counts[1:], confusion_counts(alone, mask[1:, :, :13].long(), 3)), "a repeated window counts once"
