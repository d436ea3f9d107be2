import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from firstlight.tasks.downstream.roi_head import (
    BOX_LAYER_STD,
    BoxHead,
    RoiMaxPooling,
    build_roi_pooling,
    draw_head_weights,
)


def naive_roi_pooling(map_: Tensor, box: list[float], size: int, stride: int) -> Tensor:
    """Max-pools a (C, h, w) map in a box as Fast R-CNN's layer does (roi_pooling_layer.cpp), by a loop over cells."""
    x1, y1, x2, y2 = (math.floor(side / stride + 0.5) for side in box)
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    out = torch.zeros(len(map_), size, size)
    for row in range(size):
        for column in range(size):
            top, bottom = y1 + math.floor(row * height / size), y1 + math.ceil((row + 1) * height / size)
            left, right = x1 + math.floor(column * width / size), x1 + math.ceil((column + 1) * width / size)
            cell = map_[:, max(top, 0) : min(bottom, map_.shape[1]), max(left, 0) : min(right, map_.shape[2])]
            out[:, row, column] = cell.amax((1, 2)) if cell.numel() else 0.0
    return out


def test_pooling_of_boxes_is_fast_rcnns() -> None:
    rng = torch.Generator().manual_seed(0)
    # A map of 49 positions of an image of 800 pixels has a stride of 16, whatever its convolutions lose at the edges.
    map_ = torch.randn(2, 5, 49, 49, generator=rng)
    corner = torch.rand(2, 6, 2, generator=rng) * 600
    boxes = torch.cat((corner, corner + 10 + torch.rand(2, 6, 2, generator=rng) * 180), 2)
    pool = build_roi_pooling(["4"], "max", 6)
    found = pool({"4": map_}, list(boxes), [(800, 800)] * 2)
    assert found.shape == (12, 5, 6, 6)
    for k in range(12):
        expected = naive_roi_pooling(map_[k // 6], boxes[k // 6, k % 6].tolist(), 6, 16)
        torch.testing.assert_close(found[k], expected)


def test_align_interpolates_where_max_rounds() -> None:
    map_, box = torch.arange(64.0).view(1, 1, 8, 8), [torch.tensor([[13.0, 13.0, 77.0, 77.0]])]
    aligned = build_roi_pooling(["0"], "align", 2)({"0": map_}, box, [(128, 128)])
    assert aligned.shape == (1, 1, 2, 2)
    assert not torch.equal(aligned, RoiMaxPooling("0", 2)({"0": map_}, box, [(128, 128)]))


def test_box_head_is_torchvisions_with_dropout_after_both_layers() -> None:
    torch.manual_seed(0)
    theirs = TwoMLPHead(12, 7)
    torch.manual_seed(0)
    ours = BoxHead(12, 7, 0.5)
    x = torch.randn(9, 3, 2, 2)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert torch.equal(ours.eval()(x), theirs(x))
    ours.train()
    ours.fc7.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    seen: list[Tensor] = []
    with torch.no_grad():
        ours.fc6.bias.fill_(5.0)
        ours.fc7.bias.fill_(50.0)
        out = ours(x)
    for dropped in (seen[0], out):
        assert 0.2 < float((dropped == 0).float().mean()) < 0.8


def test_gaussian_weights_are_those_of_fast_rcnn() -> None:
    """0.01 for all layers, and 0.001 for the one that gives the boxes."""
    torch.manual_seed(0)
    head, predictor, norm = BoxHead(100, 200, 0.0), FastRCNNPredictor(200, 21), nn.BatchNorm2d(3)
    draw_head_weights([head, predictor, norm], predictor, "gaussian")
    for layer, std in ((head.fc6, 0.01), (head.fc7, 0.01), (predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert not layer.bias.any()
    assert BOX_LAYER_STD == 0.001
    before = [p.clone() for p in head.parameters()]
    draw_head_weights([head, predictor], predictor, "default")
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    draw_head_weights([head, predictor], predictor, "he")
    assert float(predictor.bbox_pred.weight.detach().std()) == pytest.approx(math.sqrt(2 / 200), rel=0.05)
