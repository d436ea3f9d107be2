"""The linear probe: multinomial logistic regression on frozen features.

The problem is convex and solved to its optimum, so nothing depends on a schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier on standardised features."""

    mean: Tensor  # (d,)
    std: Tensor  # (d,)
    weight: Tensor  # (classes, d)
    bias: Tensor  # (classes,)

    def compute_scores(self, features: Tensor) -> Tensor:
        """Returns the (m, classes) logits of (m, d) features."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """Returns the (m,) int64 classes of (m, d) features."""
        return self.compute_scores(features).argmax(1)


def fit_probe(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> Probe:
    """Minimises mean cross-entropy + weight_decay / 2 * |W|^2 over (n, d) features and (n,) labels.

    The bias is not decayed.
    """
    mean, std = features.mean(0), features.std(0)
    # A dimension that is constant up to rounding must not count, even if it differs in other images.
    std[~(std > 1e-6 + 1e-5 * mean.abs())] = torch.inf
    x = (features - mean) / std
    weight = torch.zeros(classes, x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return Probe(mean, std, weight.detach(), bias.detach())


def choose_probe(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], classes: int, decays: Sequence[float]
) -> tuple[Probe, float]:
    """Fits (features, labels) with each weight decay.

    Returns the probe with the best held-out accuracy, and its decay; of equal ones that of the larger decay.
    """

    def accuracy(probe: Probe) -> float:
        return float((probe.predict(held_out[0]) == held_out[1]).double().mean())

    probes = {decay: fit_probe(*train, classes, decay) for decay in sorted(decays, reverse=True)}
    best = max(probes, key=lambda decay: accuracy(probes[decay]))
    return probes[best], best
