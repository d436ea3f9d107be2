"""Fully connected heads."""

from torch import nn

from tasks.norms import Norm, norm_layer


def mlp(size: int, hidden: tuple[int, ...], out: int, *, dropout: float, norm: Norm) -> nn.Sequential:
    """(B, size) -> (B, out). Per hidden layer Linear, norm, ReLU, and dropout after the first (NAT's code); then Linear. () is linear."""
    layers: list[nn.Module] = []
    for depth, width in enumerate(hidden):
        layers += [nn.Linear(size, width, bias=False), norm_layer(norm, width), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if depth == 0 and dropout else []
        size = width
    return nn.Sequential(*layers, nn.Linear(size, out))
