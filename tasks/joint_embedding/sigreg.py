"""SIGReg: a test that embeddings are standard normal, along random directions (Balestriero and LeCun 2025, sec. 4).

The test of Epps and Pulley compares the empirical characteristic function of n numbers x with that of N(0, 1):

    T(x) = n  integral  | 1/n sum_k exp(i t x_k) - exp(-t^2 / 2) |^2  exp(-t^2 / 2)  dt

The integrand is even in t, so that the half from 0 on is integrated and doubled, by the trapezoidal rule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import all_sum, world_size
from firstlight.tasks.counter_rng import derive_keys, draw_normal

DIRECTION_STREAM = 0x1E9A


def draw_directions(seed: int, step: int, count: int, like: Tensor) -> Tensor:
    """Returns (d, count) unit vectors, uniform on the sphere: a function of (seed, step) alone.

    `like`: (..., d), whose device and precision they have.
    """
    numbers = torch.arange(count, device=like.device)
    keys = derive_keys(seed, torch.full_like(numbers, step), numbers, DIRECTION_STREAM)
    return F.normalize(draw_normal(keys, like.shape[-1]).to(like.dtype), dim=1).T


def measure_normality(x: Tensor, knots: int, t_max: float) -> Tensor:
    """Returns the statistic T of each of (B, ...) columns over the images of all workers: (...), 0 or more.

    It is collective, with gradient. B must be the same on all workers.

    Args:
        x: the numbers that are tested, image by image.
        knots: the number of points of the integral, from 0 to `t_max`.
        t_max: the bound of the integral.
    """
    t = torch.linspace(0.0, t_max, knots, dtype=x.dtype, device=x.device)
    normal = torch.exp(-t.square() / 2.0)
    angles = x[..., None] * t
    count = len(x) * world_size()
    real, imaginary = all_sum(torch.stack((angles.cos().sum(0), angles.sin().sum(0)))) / count
    errors = ((real - normal).square() + imaginary.square()) * normal
    return 2.0 * count * torch.trapezoid(errors, t, dim=-1)
