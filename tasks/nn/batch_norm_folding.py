"""Folds batch normalisations into the layers before them: the same function as in evaluation mode, without them.

A trained network without batch normalisation is what Fast R-CNN and voc-classification fine-tune; their networks have
none (NAT, section 4.2: "We get rid of batch normalization layers").
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.nn.weight_init import WeightedLayer

# The largest difference of an output from before, as a share of the largest output.
FOLDING_TOLERANCE = 1e-3


@torch.no_grad()
def fold_batch_norms(network: nn.Module, images: Tensor) -> None:
    """Computes every batch normalisation of `network` into the layer that gives its input, and removes it.

    The layers get biases. The layer that gives the input is found as the network computes `images`, so it may be built
    in any way. The mode of the network is kept.

    Args:
        network: takes `images`; returns tensors, or lists of them.
        images: any input; outputs before and after are compared on it.

    Raises:
        ValueError: there is no batch normalisation, or one that no convolution or linear layer gives its input alone,
            as in a DenseNet; `network` is then as before.
    """
    training = network.training
    network.eval()
    try:
        before = _list_tensors(network(images))
        pairs = _find_pairs(network, images)
        saved = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        bare = [layer for layer, _ in pairs.values() if layer.bias is None]
        for norm, (layer, _) in pairs.items():
            _fold_into(layer, norm)
        names = _replace_modules(network, {norm: _without_norm(norm) for norm in pairs})
        if not _equal_outputs(before, _list_tensors(network(images))):
            for name, norm in names.items():
                network.set_submodule(name, norm)
            for layer in bare:
                layer.bias = None
            network.load_state_dict(saved)
            raise ValueError("without its batch normalisations the network computes something else")
    finally:
        network.train(training)


def _find_pairs(network: nn.Module, images: Tensor) -> dict[_BatchNorm, tuple[WeightedLayer, Tensor]]:
    """Returns the layer before each batch normalisation, with its output, in the order of computation.

    Raises:
        ValueError: one has no layer before it, or none exists.
    """
    made: list[tuple[WeightedLayer, Tensor]] = []
    pairs: dict[_BatchNorm, tuple[WeightedLayer, Tensor]] = {}
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]

    def see_layer(layer: nn.Module, _: Any, out: Tensor) -> None:
        assert isinstance(layer, WeightedLayer)
        made.append((layer, out))

    def see_norm(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        # The list holds the outputs, so an output is the same object only if it is the same.
        found = [pair for pair in made if pair[1] is given[0]]
        if found and norm not in pairs:
            pairs[norm] = found[0]

    handles = [m.register_forward_hook(see_layer) for m in network.modules() if isinstance(m, WeightedLayer)]
    handles += [norm.register_forward_pre_hook(see_norm) for norm in norms]
    network(images)
    for handle in handles:
        handle.remove()
    if not norms:
        raise ValueError("the network has no batch normalisation")
    foldable = [norm for norm in norms if norm in pairs and norm.running_var is not None]
    if len(foldable) < len(norms):
        raise ValueError(
            f"{len(norms) - len(foldable)} of the network's {len(norms)} batch normalisations follow no convolution"
        )
    return pairs


def _fold_into(layer: WeightedLayer, norm: _BatchNorm) -> None:
    """Scales the output channels of `layer` as `norm` does in evaluation mode, in double precision."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
    shift = 0.0 if norm.bias is None else norm.bias.double()
    bias = 0.0 if layer.bias is None else layer.bias.double()
    folded = (shift + (bias - norm.running_mean.double()) * scale).to(layer.weight.dtype)
    # The weight of a deconvolution has its output channels second.
    shape = [1] * layer.weight.ndim
    shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0] = -1
    layer.weight.copy_(layer.weight.double() * scale.view(shape))
    if layer.bias is None:
        layer.bias = nn.Parameter(folded, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(folded)


def _without_norm(norm: _BatchNorm) -> nn.Module:
    """Returns what stays in place of a normalisation: timm's may hold the activation that follows it."""
    return nn.Sequential(*norm.children()) if list(norm.children()) else nn.Identity()


def _replace_modules(network: nn.Module, fresh: dict[_BatchNorm, nn.Module]) -> dict[str, _BatchNorm]:
    """Replaces modules wherever they stand; returns the old ones by name."""
    names = {
        name: module
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module in fresh
    }
    for name, module in names.items():
        network.set_submodule(name, fresh[module])
    return names


def _list_tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _equal_outputs(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(
        bool((a - b).abs().max() <= FOLDING_TOLERANCE * b.abs().max()) for a, b in zip(after, before, strict=True)
    )
