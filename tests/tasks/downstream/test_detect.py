import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_pool

from firstlight.tasks.downstream.detect import Detection, coco_average_precision, detection_average_precisions
from firstlight.tasks.downstream.windows import sliding_windows
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from tests.support.batches import batch_of_images

SIZE = 48


def task(**options: object) -> Detection:
    torch.manual_seed(0)
    encoder = Encoder({"name": "convnet", "norm": "group", "width": 8, "depth": 3}, SIZE)
    return Detection(encoder, 2, **{"anchors": (16, 32), "hidden": 32, **options})  # type: ignore[arg-type]


def squares(n: int = 8, seed: int = 0) -> Batch:
    """Images with a bright (class 0) or a dark (class 1) square on gray, and a difficult object that is not drawn."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.full((n, 3, SIZE, SIZE), 0.5) + 0.02 * torch.rand(n, 3, SIZE, SIZE, generator=rng)
    boxes, classes = torch.zeros(n, 3, 4), torch.full((n, 3), -1)
    for i in range(n):
        x, y, side = (int(torch.randint(low, high, (1,), generator=rng)) for low, high in ((2, 20), (2, 20), (14, 26)))
        classes[i, 0] = i % 2
        images[i, :, y : y + side, x : x + side] = 1.0 - float(i % 2)
        boxes[i, 0] = torch.tensor([x, y, x + side, y + side])
    classes[:, 1], boxes[:, 1] = 0, torch.tensor([0.0, 0.0, 5.0, 5.0])
    difficult = torch.zeros(n, 3, dtype=torch.bool)
    difficult[:, 1] = True
    targets = {"boxes": boxes, "box_classes": classes, "difficult": difficult}
    return batch_of_images(images, targets)


@pytest.mark.parametrize("options", [{}, {"pyramid": 16, "anchors": (8, 16, 32)}, {"train": "head"}])
def test_every_trained_parameter_gets_a_gradient(options: dict[str, object]) -> None:
    learner = task(**options).train()
    losses = learner(squares())
    losses["loss"].backward()
    assert set(losses) == {"loss", "loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg"}
    assert float(losses["loss"].detach()) == pytest.approx(
        sum(float(v.detach()) for k, v in losses.items() if k != "loss"), rel=1e-5
    )
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)


def test_fast_rcnn_learns_from_windows_without_a_proposal_network() -> None:
    learner, b = task(proposals="windows").train(), squares()
    assert not any(name.startswith("detector.rpn") for name, _ in learner.named_parameters())
    losses = learner(b)
    losses["loss"].backward()
    assert set(losses) == {"loss", "loss_box_reg", "loss_classifier"}
    assert all(p.grad is not None for p in learner.parameters())


@pytest.mark.parametrize("proposals", ["network", "windows"])
def test_detections_of_an_image_do_not_depend_on_the_batch(proposals: str) -> None:
    learner, b = task(proposals=proposals).eval(), squares(11)
    with torch.no_grad():
        together = learner.observe(b)[0]
        alone = torch.cat([learner.observe(b.select_range(k, k + 1))[0] for k in range(11)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert bool((together[..., 5] >= 0).any(1).all())


FAST: dict[str, object] = {
    "proposals": "windows",
    "last_pool": "drop",
    "roi_pooling": "max",
    "roi_size": 6,
    "dropout": 0.5,
    "init": "gaussian",
}


def test_boxes_of_fast_rcnn_are_taken_from_the_map_before_the_last_pooling() -> None:
    """The map of AlexNet before pool5 has one position in 16 pixels; 6 x 6 of them go to fc6."""
    encoder = Encoder({"name": "alexnet", "input": "sobel", "normalize": "image"}, 160)
    learner = Detection(encoder, 2, anchors=(32, 64), hidden=8, **FAST).eval()  # type: ignore[arg-type]
    assert encoder.shapes[-1] == (256, 9, 9), "160 / 16, less what the first convolution loses at the edges"
    assert learner.detector.roi_heads.box_head.fc6.in_features == 256 * 36
    seen: list[Tensor] = []
    learner.detector.roi_heads.box_roi_pool.register_forward_hook(
        lambda _, given, out: seen.extend((given[0]["4"], out))
    )
    learner.detect_objects(torch.rand(1, 3, 160, 160))
    map_, pooled = seen
    windows = sliding_windows(160, (32, 64))
    assert pooled.shape == (len(windows), 256, 6, 6)
    torch.testing.assert_close(pooled, roi_pool(map_, [windows], 6, 1 / 16))


def test_layers_of_the_box_head_are_drawn_as_in_fast_rcnn() -> None:
    heads = task(**FAST).detector.roi_heads
    for layer, std in (
        (heads.box_head.fc6, 0.01),
        (heads.box_head.fc7, 0.01),
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
    ):
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.2)
        assert not layer.bias.any()
    (dropout,) = [module for module in heads.box_head.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropout.p == 0.5


def test_fast_rcnn_without_pool5_learns_squares() -> None:
    learner, b = task(**{**FAST, "sampled": 64, "dropout": 0.1, "init": "he"}), squares(4)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = learner.train()(b)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


@pytest.mark.parametrize("kind", ["sobel", "rgb_sobel"])
def test_black_bars_of_an_image_change_no_detection(kind: str) -> None:
    """They are 0 after the normalisation, whatever is there before it: Fast R-CNN pads normalised images."""
    torch.manual_seed(0)
    spec = {"name": "convnet", "norm": "group", "width": 8, "depth": 3, "input": kind, "normalize": "image"}
    learner = Detection(Encoder(spec, SIZE), 2, anchors=(16, 32), hidden=32)
    b = squares(4)
    region = torch.tensor([0.0, 6.0, SIZE, SIZE - 6.0]).expand(4, 4)
    views = [b.views[0].clone() for _ in range(2)]
    for view, value in zip(views, (0.0, 1.0), strict=True):
        view[:, :, :6], view[:, :, -6:] = value, value
    black, white = (batch_of_images(view, {**b.targets, "region": region}) for view in views)
    losses = []
    for batch in (black, white):
        torch.manual_seed(0)
        losses.append(float(learner.train()(batch)["loss"].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    learner.eval()
    with torch.no_grad():
        assert torch.equal(learner.observe(black)[0], learner.observe(white)[0])
        without = [learner.observe(batch_of_images(view, b.targets))[0] for view in views]
    assert not torch.allclose(*without), "as part of the image they change everything"


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"^roi_pooling: 'max' takes boxes from one map, not from a pyramid"):
        task(pyramid=16, anchors=(8, 16, 32), roi_pooling="max")
    with pytest.raises(ValueError, match=r"^last_pool: 'drop' is not valid: network1 does not end with one max-pool"):
        Detection(Encoder({"name": "network1", "m": [1, 1, 0, 0], "width": 2}, SIZE), 2, last_pool="drop")


def test_images_without_objects_can_be_learned_from() -> None:
    b = squares()
    b.targets["box_classes"][:] = -1
    losses = task().train()(b)
    losses["loss"].backward()
    assert math.isfinite(float(losses["loss"].detach()))


@pytest.mark.parametrize("sampled", [3, 40])
def test_sampled_is_the_number_of_proposals_per_image(sampled: int) -> None:
    learner, seen = task(sampled=sampled).train(), []
    learner.detector.roi_heads.box_head.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    learner(squares())
    assert seen == [8 * sampled]


def test_pyramid_needs_an_anchor_for_each_level() -> None:
    with pytest.raises(ValueError, match=r"anchors: .* 2 for the 3 levels"):
        task(pyramid=16)


@pytest.mark.parametrize("proposals", ["network", "windows"])
def test_detection_learns_squares(proposals: str) -> None:
    learner, b = task(proposals=proposals, sampled=64), squares(4)
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = learner.train()(b)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    with torch.no_grad():
        found, truth = learner.eval().observe(b)
        shown = learner.draw_predictions(b)
    assert found.shape == (4, 100, 6)
    assert truth.shape == (4, 3, 6)
    assert torch.equal(truth[..., 4].long(), b.targets["box_classes"])
    assert shown["predicted"].shape == shown["truth"].shape == b.views[0].shape
    assert not torch.equal(shown["truth"], b.views[0])


def rows(found: list[list[float]], truth: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Detections and objects of one image, padded by a row of class -1."""
    return torch.tensor([[*found, [-1.0] * 6]]), torch.tensor([[*truth, [0, 0, 0, 0, -1, 0]]], dtype=torch.float32)


OBJECT = [0.0, 0.0, 10.0, 10.0]


def test_average_precision_of_hand_computed_cases() -> None:
    found, truth = rows([[*OBJECT, 0.9, 0]], [[*OBJECT, 0, 0]])
    assert detection_average_precisions(found, truth, 0) == (1.0, 1.0)
    assert all(math.isnan(value) for value in detection_average_precisions(found, truth, 1))
    # a second detection of the same object is false, wherever it stands
    found, truth = rows([[*OBJECT, 0.9, 0], [*OBJECT, 0.8, 0]], [[*OBJECT, 0, 0], [20, 20, 30, 30, 0, 0]])
    assert detection_average_precisions(found, truth, 0) == pytest.approx((0.5, 6 / 11))
    # an overlap of half counts, of less does not
    found, truth = rows([[0, 0, 10, 5, 0.9, 0]], [[*OBJECT, 0, 0]])
    assert detection_average_precisions(found, truth, 0)[0] == 1.0
    found, truth = rows([[0, 0, 10, 4.9, 0.9, 0]], [[*OBJECT, 0, 0]])
    assert detection_average_precisions(found, truth, 0)[0] == 0.0
    # difficult objects count for nothing, found or not
    found, truth = rows([[*OBJECT, 0.9, 0], [20, 20, 30, 30, 0.8, 0]], [[*OBJECT, 0, 1], [20, 20, 30, 30, 0, 0]])
    assert detection_average_precisions(found, truth, 0) == (1.0, 1.0)
    assert detection_average_precisions(*rows([], [[*OBJECT, 0, 0]]), 0) == (0.0, 0.0)


def devkit(found: Tensor, truth: Tensor, kind: int) -> tuple[float, float]:
    """VOCevaldet.m and VOCap.m of the development kit, line by line."""
    detections = sorted(
        ((float(row[4]), i, row[:4]) for i, image in enumerate(found) for row in image if int(row[5]) == kind),
        key=lambda d: -d[0],
    )
    objects = {i: [(row[:4], bool(row[5])) for row in image if int(row[4]) == kind] for i, image in enumerate(truth)}
    detected: dict[int, set[int]] = {i: set() for i in objects}
    npos = sum(not difficult for image in objects.values() for _, difficult in image)
    tp, fp = np.zeros(len(detections)), np.zeros(len(detections))
    for d, (_, i, box) in enumerate(detections):
        best, place = -math.inf, -1
        for j, (other, _) in enumerate(objects[i]):
            w = float(min(box[2], other[2]) - max(box[0], other[0]))
            h = float(min(box[3], other[3]) - max(box[1], other[1]))
            if w > 0 and h > 0:
                union = (
                    float((box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1])) - w * h
                )
                if w * h / union > best:
                    best, place = w * h / union, j
        if best >= 0.5:
            if not objects[i][place][1]:
                tp[d], fp[d] = (1, 0) if place not in detected[i] else (0, 1)
                detected[i].add(place)
        else:
            fp[d] = 1
    tp, fp = tp.cumsum(), fp.cumsum()
    rec, prec = tp / npos, tp / np.maximum(fp + tp, 1e-9)
    eleven = sum(max(prec[rec >= t - 1e-9], default=0.0) / 11 for t in np.linspace(0, 1, 11))
    mrec, mpre = np.array([0, *rec, 1]), np.array([0, *prec, 0])
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    steps = np.flatnonzero(mrec[1:] != mrec[:-1]) + 1
    return float(((mrec[steps] - mrec[steps - 1]) * mpre[steps]).sum()), float(eleven)


def random_rows(seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([boxes(rng, 12, 4), rng.integers(-1, 2, (12, 4, 1)), rng.integers(0, 5, (12, 4, 1)) == 0], 2)
    near = truth[..., :4] + rng.normal(0, 2.5, (12, 4, 4))
    guesses = np.concatenate([near, boxes(rng, 12, 3)], 1)
    found = np.concatenate([guesses, rng.random((12, 7, 1)), rng.integers(0, 2, (12, 7, 1))], 2)
    found[rng.random((12, 7)) < 0.2] = -1.0
    return torch.from_numpy(found).float(), torch.from_numpy(truth).float()


def boxes(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    corner, size = rng.random((n, k, 2)) * 40, 8 + rng.random((n, k, 2)) * 20
    return np.concatenate([corner, corner + size], 2)


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_equals_the_development_kits(seed: int) -> None:
    found, truth = random_rows(seed)
    for kind in range(2):
        assert detection_average_precisions(found, truth, kind) == pytest.approx(devkit(found, truth, kind), abs=1e-9)


def test_map_50_is_close_to_torchmetrics() -> None:
    """COCO interpolates at 101 recalls, so the values are only close."""
    from torchmetrics.detection import MeanAveragePrecision

    found, truth = random_rows(0)
    truth[..., 5] = 0
    metric = MeanAveragePrecision(iou_thresholds=[0.5])
    for seen, real in zip(found, truth, strict=True):
        seen, real = seen[seen[:, 5] >= 0], real[real[:, 4] >= 0]
        metric.update(
            [{"boxes": seen[:, :4], "scores": seen[:, 4], "labels": seen[:, 5].long()}],
            [{"boxes": real[:, :4], "labels": real[:, 4].long()}],
        )
    ours = np.mean([detection_average_precisions(found, truth, kind)[0] for kind in range(2)])
    assert ours == pytest.approx(float(metric.compute()["map"]), abs=0.02)


def test_coco_of_perfect_and_of_no_detections() -> None:
    found, truth = rows([[0, 0, 40, 40, 0.9, 0]], [[0, 0, 40, 40, 0, 0]])
    assert coco_average_precision(found, truth) == pytest.approx(1.0)
    found, truth = rows([], [[0, 0, 40, 40, 0, 0]])
    assert coco_average_precision(found, truth) == 0.0
    found, truth = rows([[0, 0, 40, 40, 0.9, 0]], [[0, 0, 40, 40, 0, 1]])
    assert math.isnan(coco_average_precision(found, truth)), "all objects are difficult, so there is nothing to score"
