"""Rescales first weights by the responses to images (Kraehenbuehl et al. 2016, "Data-dependent initializations of
convolutional neural networks"), so that all layers of a network change at about the same rate.

Their algorithm 1 normalises the responses of each layer, channel by channel; algorithm 2 balances the layers. Both keep
the directions of the filters: the weights may be drawn or pretrained.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.weight_init import WeightedLayer

# beta of algorithm 1; the default of the authors' code (magic_init.py, --bias).
RESPONSE_MEAN = 0.1
# Algorithm 2 takes "roughly 10 iterations"; their code stops when no layer is off by more than 1 %.
MAX_BALANCE_ROUNDS = 10
BALANCE_TOLERANCE = 0.01
# The seed of the random gradients at the outputs.
GRADIENT_SEED = 0

NetworkRun = Callable[[], Any]


def find_hidden_layers(run: NetworkRun, network: nn.Module, outputs: Sequence[nn.Module]) -> list[WeightedLayer]:
    """Returns the convolutions and linear layers that the layers `outputs` depend on, in the order of computation."""
    return list(measure_change_rates(run, network, outputs))


def measure_change_rates(
    run: NetworkRun, network: nn.Module, outputs: Sequence[nn.Module]
) -> dict[WeightedLayer, float]:
    """Returns the rate of change of each layer before the layers `outputs`, in the order of computation.

    The rate is the root mean square of the gradient over that of the weights, the gradient at the outputs being normal
    random numbers, as in the authors' code: it depends on no loss. The numbers are always the same.

    Args:
        run: computes the images by `network`; the same computation each time it is called.
        network: the modules to look among.
        outputs: layers of `network` whose outputs are its predictions.
    """
    found: list[WeightedLayer] = []
    predicted: list[Tensor] = []

    def see_layer(layer: nn.Module, _: Any, out: Tensor) -> None:
        assert isinstance(layer, WeightedLayer)
        if layer in outputs:
            predicted.append(out)
        elif layer not in found:
            found.append(layer)

    layers = [module for module in network.modules() if isinstance(module, WeightedLayer)]
    trained = [layer.weight.requires_grad for layer in layers]
    handles = [layer.register_forward_hook(see_layer) for layer in layers]
    try:
        for layer in layers:
            layer.weight.requires_grad_(True)
        with torch.enable_grad():
            run()
        rng = torch.Generator().manual_seed(GRADIENT_SEED)
        random = [torch.randn(out.shape, generator=rng, dtype=out.dtype) for out in predicted]
        gradients = torch.autograd.grad(predicted, [layer.weight for layer in found], random, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for layer, flag in zip(layers, trained, strict=True):
            layer.weight.requires_grad_(flag)
    return {
        layer: float((gradient.square().mean() / layer.weight.detach().square().mean()).sqrt())
        for layer, gradient in zip(found, gradients, strict=True)
        if gradient is not None and gradient.any()
    }


@torch.no_grad()
def normalize_responses(run: NetworkRun, layers: Collection[WeightedLayer], mean: float = RESPONSE_MEAN) -> None:
    """Gives every channel of `layers` the mean `mean` and variance 1 on the images of `run` (algorithm 1).

    A layer without biases only gets the variance; a channel with constant responses is left as it is. The layers are
    normalised as `run` computes them, so each sees what the layers before it give after their normalisation.
    """
    done: set[nn.Module] = set()

    def normalize_layer(layer: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        assert isinstance(layer, WeightedLayer)
        if layer in done:
            return None
        done.add(layer)
        channel = -1 if isinstance(layer, nn.Linear) else 1
        flat = out.movedim(channel, 0).flatten(1).double()
        spread, centre = torch.std_mean(flat, 1, correction=0)
        scale = torch.where(spread > 0, 1 / spread, 1.0)
        shift = torch.where(spread > 0, mean - centre * scale, 0.0) if layer.bias is not None else 0.0 * centre
        shape = [1] * layer.weight.ndim
        shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0] = -1
        layer.weight.mul_(scale.view(shape).to(layer.weight.dtype))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() * scale + shift)
        sides = [1] * out.ndim
        sides[channel] = -1
        return out * scale.view(sides).to(out.dtype) + shift.view(sides).to(out.dtype)

    handles = [layer.register_forward_hook(normalize_layer) for layer in layers]
    run()
    for handle in handles:
        handle.remove()


def balance_change_rates(run: NetworkRun, network: nn.Module, outputs: Sequence[nn.Module]) -> None:
    """Scales each layer before the layers `outputs` so that all change at the same rate (algorithm 2).

    Layer k is scaled by r_k = sqrt(C_k / C), C_k being its rate and C their geometric mean: weights that change too
    fast grow, and their gradients shrink. The r_k multiply to 1, so a chain of layers with ReLU and max-pooling
    computes the same function as before. Biases are scaled with the inputs of their layers, as these are measured.

    Args:
        run: as of `measure_change_rates`.
        network: as there.
        outputs: layers of `network` that are left as they are.
    """
    for _ in range(MAX_BALANCE_ROUNDS):
        rates = measure_change_rates(run, network, outputs)
        logs = torch.tensor(list(rates.values()), dtype=torch.float64).log()
        if not len(logs) or float((logs - logs.mean()).abs().max()) < BALANCE_TOLERANCE:
            return
        _scale_layers(run, dict(zip(rates, ((logs - logs.mean()) / 2).exp().tolist(), strict=True)))


@torch.no_grad()
def _scale_layers(run: NetworkRun, factors: dict[WeightedLayer, float]) -> None:
    """Scales weights by the factors of their layers, and biases also by what that makes of the layers' inputs."""
    before = _measure_inputs(run, factors)
    done: set[nn.Module] = set()

    def scale_layer(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, WeightedLayer)
        if layer in done:
            return
        done.add(layer)
        layer.weight.mul_(factors[layer])
        if layer.bias is not None and before[layer] > 0:
            layer.bias.mul_(factors[layer] * float(given[0].abs().double().mean()) / before[layer])

    handles = [layer.register_forward_pre_hook(scale_layer) for layer in factors]
    run()
    for handle in handles:
        handle.remove()


def _measure_inputs(run: NetworkRun, layers: Collection[WeightedLayer]) -> dict[nn.Module, float]:
    """Returns the mean absolute input of each layer."""
    found: dict[nn.Module, float] = {}

    def see_input(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.setdefault(layer, float(given[0].abs().double().mean()))

    handles = [layer.register_forward_pre_hook(see_input) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return found
