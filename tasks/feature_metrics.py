"""What features tell of themselves, without labels. All take (n, d) features and compute in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 2048  # of the largest matrix whose eigenvalues are computed
PAIRED = 4096  # images of which all pairs are looked at, at most
BLOCK = 1024


def rankme(features: Tensor) -> float:
    """Effective rank (Garrido et al. 2023, eq. 1): exp(- sum_k p_k log p_k), p_k = s_k / sum_j s_j + 1e-7, s the singular values of the features.

    From 1, all features on one line, to min(n, d). Where both n and d are above 2,048, of 2,048 of the images.
    """
    x = (_spread(features, SIDE) if features.shape[1] > SIDE else features).double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return float((-(p * p.log()).sum()).exp())


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two views' normalised features (Wang and Isola 2020, alpha = 2): 0 where the views of an image coincide, at most 4."""
    return float((F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)).square().sum(1).mean())


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different images' normalised features (Wang and Isola 2020, t = 2).

    0 where all features coincide; lower is more evenly spread over the sphere. Of at most 4,096 of the images.
    """
    x = F.normalize(_spread(features, PAIRED).double(), dim=1)
    total = sum(float((-2.0 * torch.cdist(block, x).square()).exp().sum()) for block in x.split(BLOCK))
    pairs = len(x) * (len(x) - 1)
    return float(torch.tensor((total - len(x)) / pairs, dtype=torch.float64).log()) if pairs else 0.0


def feature_std(features: Tensor) -> float:
    """Mean over dimensions of the standard deviation of the normalised features: 1 / sqrt(d) where they are evenly spread, 0 where they coincide."""
    return float(F.normalize(features.double(), dim=1).std(0, correction=0).mean())


def dead(features: Tensor) -> float:
    """Share of the dimensions that are the same for all images, up to rounding."""
    x = features.double()
    return float((x.std(0, correction=0) <= 1e-6 + 1e-5 * x.mean(0).abs()).double().mean())


def signals(features: Tensor) -> dict[str, float]:
    """All that need one view of an image, by name; {} where a feature is not a finite number."""
    if not bool(torch.isfinite(features).all()):
        return {}
    measures = {"rankme": rankme, "uniformity": uniformity, "feature_std": feature_std, "dead_dimensions": dead}
    return {name: measure(features) for name, measure in measures.items()}


def collapse(found: dict[str, float], dimensions: int) -> str | None:
    """What says that the features have collapsed, None where nothing does: almost one line, or almost one point."""
    if found["rankme"] < 2:
        return f"their effective rank is {found['rankme']:.2f} of {dimensions}"
    even = dimensions**-0.5
    if found["feature_std"] < 0.05 * even:
        return f"their standard deviation is {found['feature_std'] / even:.1%} of that of evenly spread ones"
    return None


def _spread(features: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, evenly spread."""
    return features[
        torch.linspace(0, len(features) - 1, min(most, len(features)), dtype=torch.float64)
        .round()
        .long()
        .to(features.device)
    ]
