"""The contract of a downstream task: a learner that starts from an encoder and is scored on unseen images."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from firstlight.tasks.downstream.whole_images import ImageViews
from firstlight.tasks.learner import Batch, Learner
from firstlight.tasks.nn.encoders import Encoder

TargetKind = Literal["label", "present", "mask", "boxes"]
TrainedPart = Literal["all", "head"] | Annotated[int, Ge(1)]
LayerDecay = Annotated[float, Gt(0.0), Le(1.0)]
# Scores by name; larger is better. A list has one score of each class, NaN for a class that does not occur.
Scores = Mapping[str, float | list[float]]


class Task(Learner):
    """A supervised task on an encoder.

    The keyword-only parameters of `__init__` are the task's hyper-parameters. Their annotations are the schema that the
    config checks, and their defaults stand nowhere else.

    `train`: the layers that are trained besides the task's own: `all` of the encoder, none of it (`head`), or, for a
    number n, the layers after its first n feature maps. Frozen layers keep their batch statistics.
    `layer`: the index of the feature map that is the input of the task's layers; -1 is the deepest.
    `layer_decay`: the factor of the learning rate from a feature map's layers to those of the map before it
    (discriminative learning rates, Howard and Ruder 2018, section 3.2). The task's own layers, and those of the deepest
    map, have the rate itself.

    Raises (`__init__`):
        ValueError: the parameters do not fit the encoder; the message starts with the parameter's name.
    """

    # The kind of target that the task learns from.
    target: ClassVar[TargetKind]
    # The name of the score that settings are chosen by and tables show.
    measure: ClassVar[str]
    # The name of the list of scores by class whose mean is `measure`.
    by_class: ClassVar[str | None] = None

    def __init__(
        self, encoder: Encoder, classes: int, *, train: TrainedPart = "all", layer: int = -1, layer_decay: float = 1.0
    ) -> None:
        super().__init__()
        self.encoder, self.classes, self.layer_decay = encoder, classes, layer_decay
        self.layer = _resolve_layer("layer", layer, encoder)
        self._frozen_modules = _freeze_encoder(encoder, train, self.layer)

    @abstractmethod
    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the facts about each image that `score` needs, from all views of a batch: tensors of B rows."""

    @abstractmethod
    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        """Returns the scores of a set from the observed rows of all its images; `measure` is among them."""

    @abstractmethod
    def predict_images(self, images: Sequence[ImageViews]) -> list[dict[str, Tensor]]:
        """Returns the predictions of each of at least one image, by name, in the pixels of the image.

        It is called in evaluation mode, without gradients. All tasks of one kind of target have the same predictions:
        `probabilities` for labels, `mask` for masks, `boxes`, `scores` and `labels` for boxes.
        """

    def draw_predictions(self, batch: Batch) -> dict[str, Tensor]:
        """Returns (B, 3, H, W) images in 0..1 by caption that show predictions; {} if there is nothing to show."""
        return {}

    def output_layers(self) -> tuple[nn.Module, ...]:
        """Returns the layers whose outputs are the task's predictions; () if the first weights are never rescaled."""
        return ()

    def probe_outputs(self, batch: Batch) -> None:
        """Computes `output_layers` of a batch, in training mode, as a function of the layers before them alone."""
        self.embed(batch)

    def start_from(self, networks: Mapping[str, nn.Module]) -> None:
        """Copies the networks that a pretraining has exported besides the encoder.

        Raises:
            ValueError: the task cannot use them, or they do not fit.
        """
        raise ValueError(f"{', '.join(networks) or 'nothing'}: a task of this kind starts from the encoder only")

    def train(self, mode: bool = True) -> "Task":
        """Sets the mode, except that frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self

    def list_encoder_blocks(self) -> list[set[nn.Parameter]]:
        """Returns the encoder's trained parameters by feature map, up to the map that the task takes."""
        return self.encoder.parameter_blocks()[: self.layer + 1]


def at_least_float32(x: Tensor) -> Tensor:
    """Converts to at least single precision: losses are not computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _resolve_layer(name: str, layer: int, encoder: Encoder) -> int:
    """Returns the index of a feature map, counted from the shallowest."""
    maps = len(encoder.shapes)
    if not -maps <= layer < maps:
        raise ValueError(f"{name}: {layer} is none of the encoder's {maps} feature maps; valid: {-maps} to {maps - 1}")
    return layer % maps


def _freeze_encoder(encoder: Encoder, train: TrainedPart, layer: int) -> Sequence[nn.Module]:
    """Freezes the layers that `train` excludes, and those that the map `layer` is not computed from.

    Returns the modules that must stay in evaluation mode.
    """
    blocks = encoder.parameter_blocks()
    if not isinstance(train, str) and train > layer:
        raise ValueError(
            f"train: {train} leaves nothing of the encoder to train; valid: all, head, 1 to {layer}"
            if layer
            else f"train: {train}"
        )
    first = {"all": 0, "head": len(blocks)}[train] if isinstance(train, str) else train
    trained = set[nn.Parameter]().union(*blocks[first : layer + 1])
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter in trained)
    if train == "all":
        return ()
    return [m for m in encoder.modules() if (own := list(m.parameters())) and not any(p.requires_grad for p in own)]
