import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firstlight.tasks.downstream.segment import (
    VOID_CLASS,
    MirrorHead,
    Segmentation,
    confusion_counts,
    overlay_classes,
    voc_palette,
)
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


def test_absent_class_is_not_in_mean_iou() -> None:
    mask = torch.tensor([[[0, 0, 1, VOID_CLASS]]])
    scores = task().score((confusion_counts(mask.clamp_max(1), mask, 3),))
    assert scores["mean_iou"] == 1.0
    iou = scores["iou"]
    assert isinstance(iou, list)
    assert math.isnan(iou[2])


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
