"""The contract of a pretraining method."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from firstlight.tasks.learner import Batch, Learner
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.visuals import Curve, Picture


@dataclass(frozen=True)
class Setting:
    """What a method knows of its training besides its own parameters."""

    size: int  # images trained on: the rows of its tables are 0..size-1
    epochs: int
    seed: int  # of everything it draws
    classes: int = 0  # of the data set; 0: it has none
    labels: Tensor | None = None  # (size,) int64, -1 = unknown. For what is logged only: they must not reach a loss


@dataclass(frozen=True)
class Needs:
    """What a method must find in every batch."""

    views: int = 1  # augmented views of an image
    labels: bool = False  # labelled images among the others


class Method(Learner):
    """A pretraining objective around an encoder, which is what later stages receive.

    The keyword-only parameters of `__init__` are its hyper-parameters: the config checks them by their annotations.
    `title`, `paper` and `deviations` (what is done otherwise than in the paper, or is not given there) go into the model card.

    Raises (`__init__`):
        ValueError: the parameters do not fit the encoder or the setting; the message starts with the parameter's name.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    deviations: ClassVar[tuple[str, ...]] = ()
    judged: ClassVar[tuple[str, ...]] = ()  # the names of what `judge` tells
    told: ClassVar[tuple[str, ...]] = ()  # the losses' names that a paper reports of a training

    def __init__(self, encoder: Encoder, setting: Setting) -> None:
        super().__init__()
        self.encoder, self.setting = encoder, setting

    @classmethod
    def needs(cls, **parameters: Any) -> Needs:
        """What batches must have for these hyper-parameters."""
        return Needs()

    def handed_on(self) -> dict[str, nn.Module]:
        """Networks besides the encoder that later stages may start from, by name."""
        return {}

    def predict(self, images: Tensor) -> Tensor | None:
        """(B, 3, H, W) in 0..1 -> (B,) int64 classes, where the method has learned a classifier from labels; None where it has not."""
        return None

    def judge(self, batch: Batch) -> dict[str, Tensor]:
        """(B,) numbers by name, how well it does what it learned on each image of a batch that it was not trained on."""
        return {}

    def pictures(self, batch: Batch) -> tuple[Picture, ...]:
        """What was learned, shown on held-out images; () where there is nothing to see. Called before the first step, too, for the rows of the
        untrained network; in evaluation mode, without gradients, on rank 0 alone: no collectives. Draws no random numbers."""
        return ()

    @classmethod
    def curves(cls, epochs: int, **parameters: Any) -> tuple[Curve, ...]:
        """Figures of what these hyper-parameters log that want more than a line over the steps."""
        return ()
