"""The contract of a downstream task: a learner that starts from an encoder, and tells how good it is on images that it has not seen."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from firstlight.tasks.learner import Batch, Learner
from firstlight.tasks.nn.encoders import Encoder

Target = Literal["label", "present", "mask", "boxes"]
Train = Literal["all", "head"] | Annotated[int, Ge(1)]
Decay = Annotated[float, Gt(0.0), Le(1.0)]
Scores = Mapping[
    str, float | list[float]
]  # by name, larger is better; a list has one of each class, NaN where there is none


class Task(Learner):
    """The keyword-only parameters of `__init__` are its hyper-parameters: the config checks them by their annotations. All tasks have

    `train`: what is trained besides the task's own layers. `all` of the encoder, none of it (`head`), or, for a number n, the layers behind its
    first n feature maps. What is not trained keeps its batch statistics.
    `layer_decay`: factor of the learning rate from a feature map's layers to those of the map before it (discriminative learning rates, Howard
    and Ruder 2018, section 3.2); the task's own layers, and those of the deepest map, have the rate itself.

    Raises (`__init__`):
        ValueError: the parameters do not fit the encoder; the message starts with the parameter's name.
    """

    target: ClassVar[Target]  # what it learns from
    measure: ClassVar[str]  # the score that settings are chosen by, and that tables show
    by_class: ClassVar[str | None] = None  # the list whose mean `measure` is

    def __init__(
        self, encoder: Encoder, classes: int, *, train: Train = "all", layer: int = -1, layer_decay: float = 1.0
    ) -> None:
        super().__init__()
        self.encoder, self.classes, self.layer_decay = encoder, classes, layer_decay
        self.layer = _number("layer", layer, encoder)
        self._held = _freeze(encoder, train, self.layer)

    @abstractmethod
    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `score` must know of each image, from all the views of a batch: tensors of B rows."""

    @abstractmethod
    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        """The scores from the rows of all images of a set; `measure` is among them."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """(B, 3, H, W) images in 0..1 by caption, that show what is predicted; {} where there is nothing to see."""
        return {}

    def start_from(self, networks: Mapping[str, nn.Module]) -> None:
        """Take over what a pretraining has handed on besides the encoder.

        Raises:
            ValueError: the task has no place for it, or it does not fit.
        """
        raise ValueError(f"{', '.join(networks) or 'nothing'}: a task of this kind starts from the encoder only")

    def train(self, mode: bool = True) -> "Task":
        super().train(mode)
        for module in self._held:
            module.eval()
        return self

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        blocks = self.encoder.blocks()[: self.layer + 1]
        of_encoder = set[nn.Parameter]().union(*blocks)
        own = [p for p in self.parameters() if p.requires_grad and p not in of_encoder]
        if self.layer_decay == 1.0:
            return super().parameter_groups()
        groups = [(1.0, own), *((self.layer_decay**depth, list(block)) for depth, block in enumerate(reversed(blocks)))]
        in_order = {parameter: place for place, parameter in enumerate(self.parameters())}
        return [(factor, sorted(group, key=in_order.__getitem__)) for factor, group in groups if group]


def in_full(x: Tensor) -> Tensor:
    """At least in single precision: losses are not computed in half of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _number(name: str, layer: int, encoder: Encoder) -> int:
    """The place of a feature map, counted from the shallowest."""
    maps = len(encoder.shapes)
    if not -maps <= layer < maps:
        raise ValueError(f"{name}: {layer} is none of the encoder's {maps} feature maps; valid: {-maps} to {maps - 1}")
    return layer % maps


def _freeze(encoder: Encoder, train: Train, layer: int) -> Sequence[nn.Module]:
    """Freeze what `train` leaves out, and what the map `layer` is not computed from; the modules that must stay in evaluation mode."""
    blocks = encoder.blocks()
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
