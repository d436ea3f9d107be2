"""Metrics of features that need no labels. All take (n, d) features and compute in float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The side of the largest matrix whose eigenvalues are computed.
MAX_EIGENVALUE_SIDE = 2048
# The largest number of images whose pairs are all compared.
MAX_UNIFORMITY_IMAGES = 4096
UNIFORMITY_BLOCK = 1024


def rankme(features: Tensor) -> float:
    """Returns the effective rank exp(- sum_k p_k log p_k), p_k = s_k / sum_j s_j + 1e-7 (Garrido et al. 2023, eq. 1).

    s are the singular values of the features. The rank is between 1 (all features on one line) and min(n, d). If both n
    and d are above 2,048, it is that of 2,048 of the images.
    """
    x = (
        _take_evenly_spaced(features, MAX_EIGENVALUE_SIDE) if features.shape[1] > MAX_EIGENVALUE_SIDE else features
    ).double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return float((-(p * p.log()).sum()).exp())


def alignment(first: Tensor, second: Tensor) -> float:
    """Returns the mean squared distance of two views' normalised features (Wang and Isola 2020, alpha = 2).

    It is 0 if the views of each image coincide, and at most 4.
    """
    return float((F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)).square().sum(1).mean())


def uniformity(features: Tensor) -> float:
    """Returns log of the mean of exp(-2 |x - y|^2) over all pairs of different images (Wang and Isola 2020, t = 2).

    x and y are normalised features. The value is 0 if all features coincide; lower values are more evenly spread over
    the sphere. It takes 4,096 images if there are more.
    """
    x = F.normalize(_take_evenly_spaced(features, MAX_UNIFORMITY_IMAGES).double(), dim=1)
    total = sum(float((-2.0 * torch.cdist(block, x).square()).exp().sum()) for block in x.split(UNIFORMITY_BLOCK))
    pairs = len(x) * (len(x) - 1)
    return float(torch.tensor((total - len(x)) / pairs, dtype=torch.float64).log()) if pairs else 0.0


def feature_std(features: Tensor) -> float:
    """Returns the mean over dimensions of the standard deviation of the normalised features.

    It is 1 / sqrt(d) if they are evenly spread, and 0 if they coincide.
    """
    return float(F.normalize(features.double(), dim=1).std(0, correction=0).mean())


def dead_dimensions(features: Tensor) -> float:
    """Returns the share of the dimensions that are constant over the images, up to rounding."""
    x = features.double()
    return float((x.std(0, correction=0) <= 1e-6 + 1e-5 * x.mean(0).abs()).double().mean())


# The metrics of one view of the images, by the name that results and MLflow give them.
FEATURE_METRICS: dict[str, Callable[[Tensor], float]] = {
    "rankme": rankme,
    "uniformity": uniformity,
    "feature_std": feature_std,
    "dead_dimensions": dead_dimensions,
}


def compute_feature_metrics(features: Tensor) -> dict[str, float]:
    """Returns the metrics of one view of the images by name; {} if a feature is not finite."""
    if not bool(torch.isfinite(features).all()):
        return {}
    return {name: measure(features) for name, measure in FEATURE_METRICS.items()}


def describe_collapse(found: dict[str, float], dimensions: int) -> str | None:
    """Returns a sentence if the metrics show a collapse of the features to almost a line or a point; None otherwise."""
    if found["rankme"] < 2:
        return f"their effective rank is {found['rankme']:.2f} of {dimensions}"
    even = dimensions**-0.5
    if found["feature_std"] < 0.05 * even:
        return f"their standard deviation is {found['feature_std'] / even:.1%} of that of evenly spread ones"
    return None


def _take_evenly_spaced(features: Tensor, most: int) -> Tensor:
    """Returns at most `most` of the rows, evenly spaced."""
    rows = torch.linspace(0, len(features) - 1, min(most, len(features)), dtype=torch.float64).round().long()
    return features[rows.to(features.device)]
