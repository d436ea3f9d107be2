import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.lsuv import TOLERANCE, lsuv


def variances(network: nn.Module, images: Tensor) -> list[float]:
    """Of the outputs of the convolutions, in the order of computation."""
    found: list[float] = []
    handles = [
        m.register_forward_hook(lambda _, __, out: found.append(float(out.var())))
        for m in network.modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return found


def test_every_layer_has_outputs_of_unit_variance() -> None:
    torch.manual_seed(0)
    for norm in ("none", "batch"):
        layers = [
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        ]
        network = nn.Sequential(*(m for m in layers if norm == "batch" or not isinstance(m, nn.BatchNorm2d))).train()
        images = torch.rand(32, 3, 12, 12) * 7 + 3
        before = variances(network, images)
        assert not all(abs(v - 1) < TOLERANCE for v in before)
        lsuv(network, images)
        assert all(abs(v - 1) < TOLERANCE for v in variances(network, images))


def test_only_weights_and_biases_of_linear_layers_change() -> None:
    torch.manual_seed(0)
    encoder = Encoder({"name": "resnet18", "stem": "cifar"}, 16).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    lsuv(encoder, torch.rand(8, 3, 16, 16))
    changed = {k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])}
    convolutions = {f"{name}.weight" for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    assert changed == convolutions


def test_filters_are_orthogonal_up_to_their_scale() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    lsuv(network, torch.rand(16, 3, 10, 10))
    rows = network[0].weight.flatten(1)  # type: ignore[union-attr, operator]
    products = rows @ rows.T
    assert torch.allclose(products, torch.eye(8) * products[0, 0], atol=1e-4)


def test_a_constant_input_does_not_divide_by_zero() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    lsuv(network, torch.zeros(4, 3, 5, 5))
    assert all(torch.isfinite(p).all() for p in network.parameters())
