"""Export formats of a fine-tuned model: a library's network with its classifier, and a graph from images to logits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.downstream.classify_square import SquareLossClassification
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.extensions.error_text import take_last_line
from firstlight.tasks.nn.encoders import MapPooling
from firstlight.tasks.nn.export_formats import (
    LIBRARIES,
    MAP_TOLERANCE,
    Counterpart,
    build_library_network,
    export_graph,
    find_counterpart,
    measure_difference,
)
from firstlight.tasks.nn.library_backbones import first_line
from firstlight.tasks.nn.timm_backbones import find_timm_traits

GRAPH_FORMATS = ("onnx", "torch_export")
# The poolings of a map that timm's networks know, and the arguments of their constructors that ask for them, in the
# order in which they are tried: timm's own choice first, then such that no normalisation stands after the pooling.
TIMM_POOLINGS: dict[MapPooling, tuple[dict[str, Any], ...]] = {
    "avg": (
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "use_fc_norm": False},
        {"global_pool": "avg", "use_fc_norm": False, "use_post_transformer_norm": False},
        {"global_pool": "avg", "final_norm": False},
    ),
    "cls": (
        {},
        {"global_pool": "token"},
        {"global_pool": "token", "fc_norm": False},
        {"global_pool": "token", "use_fc_norm": False},
        {"global_pool": "token", "use_fc_norm": False, "use_post_transformer_norm": False},
        {"global_pool": "token", "final_norm": False},
    ),
}
# The names of tensors that a message has.
MAX_NAMED_TENSORS = 3


class ModelGraph(nn.Module):
    """A graph from (B, 3, S, S) images in 0..1 to logits: (B, classes), or (B, classes, S, S) of a segmentation.

    The graph contains the normalisation.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.task.compute_logits(images)  # type: ignore[operator]
        return logits


def export_model_program(task: Task) -> Any:
    """Returns the graph as a torch.export.ExportedProgram, for any number of images."""
    return export_graph(ModelGraph(task), task.encoder.image_size, task.encoder.image_channels)


@dataclass(frozen=True)
class ClassifierCounterpart:
    """A library's network with a classifier that the weights of a fine-tuned model fit."""

    encoder: Counterpart
    # The names of the classifier's weight and bias in the library.
    head: tuple[str, str]
    classes: int

    @property
    def head_name(self) -> str:
        """The name of the classifier in the library."""
        return self.head[0].rpartition(".")[0]

    def library_state(self, task: Task) -> dict[str, Tensor]:
        """Returns the tensors of the encoder and of the classifier under the library's names."""
        layer = _find_linear_head(task)
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in layer.state_dict().items()}
        return {**self.encoder.library_state(task.encoder), self.head[0]: own["weight"], self.head[1]: own["bias"]}

    def build_network(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Returns the library's network with these weights, in evaluation mode.

        Raises:
            ValueError: the network has no tensor of that name or shape, or another one.
        """
        net = _build_classifier(self.encoder, self.head_name, self.classes)
        try:
            net.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(
                f"the weights do not fit {self.encoder.model} of {self.encoder.library}: {take_last_line(error)}"
            ) from None
        return net.eval()


def find_classifier(task: Task, library: str) -> ClassifierCounterpart:
    """Returns the network of `library` that gives the logits of this model.

    Raises:
        ValueError: the library has none; the message gives the reason.
    """
    head = _find_linear_head(task, library)
    encoder = find_counterpart(task.encoder, library)
    reasons = []
    for found in _list_poolings(encoder, task):
        try:
            classifier = _find_head(task, found, head.out_features)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if _has_same_logits(task, classifier):
            return classifier
        reasons.append(f"{encoder.model} of {library}, with the same weights, gives other logits")
    raise ValueError(reasons[0])


def _list_poolings(encoder: Counterpart, task: Task) -> Iterator[Counterpart]:
    """Yields the library's network in each form that may pool its last map as a task does."""
    traits = find_timm_traits(encoder.model) if encoder.library == "timm" else None
    if traits is None or not traits.is_columnar or not isinstance(task, Classification):
        yield encoder
        return
    for arguments in TIMM_POOLINGS[task.pool]:
        if arguments.keys() <= traits.parameters:
            yield replace(encoder, options={**encoder.options, **arguments})


def _find_head(task: Task, encoder: Counterpart, classes: int) -> ClassifierCounterpart:
    """Returns a library's network with a classifier in the place of the tensors that the encoder does not fill.

    Raises:
        ValueError: they are not the weight and the bias of one linear layer, or timm does not build this form.
    """
    try:
        _, missing = _add_classes(encoder, classes).build_network(encoder.library_state(task.encoder))
    # Each of timm's networks refuses a pooling in its own way.
    except (AssertionError, TypeError) as error:
        raise ValueError(f"{encoder.model} of {encoder.library} cannot be built: {first_line(error)}") from None
    names = [next((name for name in missing if name.endswith(ending)), "") for ending in (".weight", ".bias")]
    if len(missing) != 2 or not all(names):
        more = f" and {len(missing) - MAX_NAMED_TENSORS} more" if len(missing) > MAX_NAMED_TENSORS else ""
        has = f"it has {', '.join(missing[:MAX_NAMED_TENSORS]) or 'nothing'}{more}"
        raise ValueError(f"the head of {encoder.model} of {encoder.library} is not one linear layer: {has}")
    classifier = ClassifierCounterpart(encoder, (names[0], names[1]), classes)
    _build_classifier(encoder, classifier.head_name, classes)
    return classifier


def _find_linear_head(task: Task, library: str = "timm") -> nn.Linear:
    """Returns the only layer of the head. Raises ValueError if there are others, or it takes what `library` does not
    give a head.
    """
    if not isinstance(task, Classification) or isinstance(task, SquareLossClassification):
        raise ValueError("the libraries' networks are classifiers that give logits")
    layers = list(task.head)
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear):
        raise ValueError(f"the libraries' heads are one linear layer, this one has {len(layers)} layers (task.hidden)")
    if task.pool not in (TIMM_POOLINGS if library == "timm" else ("avg",)):
        other = " or, of a ViT, its class token" if library == "timm" else ""
        raise ValueError(
            f"the heads of {library}'s networks take the mean of the last map{other}, this one has task.pool: "
            f"{task.pool}"
        )
    if task.layer != len(task.encoder.shapes) - 1:
        raise ValueError(f"the libraries' heads take the last map, this one has task.layer: {task.layer}")
    return layers[0]


def _add_classes(encoder: Counterpart, classes: int) -> Counterpart:
    """Returns a network of timm with a classifier of so many classes, which some have not by default."""
    return (
        replace(encoder, options={**encoder.options, "num_classes": classes}) if encoder.library == "timm" else encoder
    )


def _build_classifier(encoder: Counterpart, head: str, classes: int) -> nn.Module:
    """Returns a library's network with a new classifier of so many classes. `head`: the name of its classifier.

    Raises:
        ValueError: the classifier is no linear layer.
    """
    net = build_library_network(encoder.library, encoder.model, _add_classes(encoder, classes).options)
    layer = net.get_submodule(head)
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"the head of {encoder.model} of {encoder.library} is not one linear layer, but a {type(layer).__name__}"
        )
    with torch.random.fork_rng(devices=[]):
        # The constructors of torchvision do not all take a number of classes.
        net.set_submodule(head, nn.Linear(layer.in_features, classes))
    return net


@torch.no_grad()
def _has_same_logits(task: Task, classifier: ClassifierCounterpart) -> bool:
    """Returns True if model and counterpart give the same logits of an image."""
    size, training = task.encoder.image_size, task.training
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    device = next(task.parameters()).device
    task.eval()
    try:
        own = ModelGraph(task)(x.to(device)).cpu()
        there = classifier.build_network(classifier.library_state(task))(task.encoder.input(x.to(device)).cpu())
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return False
    finally:
        task.train(training)
    is_same: bool = there.shape == own.shape and measure_difference(own, there)[1] <= MAP_TOLERANCE
    return is_same


def explain_missing_model_format(task: Task, format: str, is_padded: bool) -> str | None:
    """Returns the reason why a model cannot be exported in a format; None if it can.

    `is_padded`: True if views of images have padding (`fit`).
    """
    if task.target == "boxes" and format != "safetensors":
        return "the detectors of torchvision choose boxes by their values, and give as many as they find"
    if (
        format in GRAPH_FORMATS
        and task.target == "mask"
        and is_padded
        and task.encoder.spec.get("normalize") == "image"
    ):
        return "encoder.normalize: image leaves the padding of views out, which a graph of pixels alone cannot know"
    try:
        if format in LIBRARIES:
            find_classifier(task, format)
    except ValueError as error:
        return str(error)
    return None
