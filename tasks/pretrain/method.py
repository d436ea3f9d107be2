"""The contract of a pretraining method."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from firstlight.tasks.learner import Batch, Learner
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.visuals import ImageGrid, Plot


@dataclass(frozen=True)
class TrainingInfo:
    """Facts about a training that a method may use besides its own hyper-parameters."""

    # The number of images trained on: the rows of the method's tables are 0..size-1.
    size: int
    # The number of epochs that begin. The last may be partial, where the length of the training is in steps.
    epochs: int
    # The seed of everything that the method draws.
    seed: int
    # The number of classes of the data set; 0 if it has none.
    classes: int = 0
    # (size,) int64, -1 = unknown. They are for logged metrics only, and must not reach a loss.
    labels: Tensor | None = None
    # The number of optimiser steps of the whole training, which schedules run over.
    steps: int = 1
    # The side of each view in pixels; () if all are as large as the encoder's `image_size`.
    view_sizes: tuple[int, ...] = ()
    # The network with its weights that the hyper-parameter `teacher` names, if there is one. None: the method is built
    # for a check, with a teacher of fresh weights.
    teacher: Encoder | None = None


@dataclass(frozen=True)
class BatchRequirements:
    """Requirements of a method on every batch of a training."""

    # The number of augmented views of an image.
    views: int = 1
    # True if labelled images must be among the others.
    labels: bool = False


@dataclass(frozen=True)
class ViewGroup:
    """Views of an image that are made in the same way, each with random numbers of its own."""

    # The number of views.
    count: int
    # The side of a view in pixels.
    size: int
    # The augmentations, in order, as in a recipe: `{"op": name, **parameters}`.
    augment: tuple[Mapping[str, Any], ...]


class Method(Learner):
    """A pretraining objective around an encoder. Later stages receive the encoder.

    The keyword-only parameters of `__init__` are the method's hyper-parameters. Their annotations are the schema that
    the config checks, and their defaults stand nowhere else. The class docstring describes each of them, and says what
    its default is taken from. `title`, `paper` and `deviations` (everything that is done otherwise than in the paper,
    or that the paper does not give) go into the model card.

    Raises (`__init__`):
        ValueError: the parameters do not fit the encoder or the training; the message starts with the parameter's name.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    deviations: ClassVar[tuple[str, ...]] = ()
    # The names of the metrics that `measure_images` gives.
    image_metrics: ClassVar[tuple[str, ...]] = ()
    # The names of logged metrics that a paper reports of a training.
    reported_metrics: ClassVar[tuple[str, ...]] = ()
    # True if `default_views` leaves the crop of `augment` and the size of images as they are. A class that makes views
    # of its own says so.
    keeps_crops: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "default_views" in vars(cls) and "keeps_crops" not in vars(cls):
            cls.keeps_crops = False

    def __init__(self, encoder: Encoder, info: TrainingInfo) -> None:
        super().__init__()
        self.encoder, self.info = encoder, info

    def list_encoder_blocks(self) -> list[set[nn.Parameter]]:
        """Returns the encoder's trained parameters by feature map, shallow to deep."""
        return self.encoder.parameter_blocks()

    @classmethod
    def complete_parameters(cls, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all hyper-parameters: those of `parameters`, and the defaults of `__init__` for the others.

        Raises:
            TypeError: `parameters` names one that `__init__` does not have.
        """
        declared = inspect.signature(cls.__init__).parameters.values()
        defaults = {p.name: p.default for p in declared if p.kind is p.KEYWORD_ONLY}
        if unknown := set(parameters) - set(defaults):
            raise TypeError(f"{cls.__name__} has no hyper-parameter {sorted(unknown)}; valid: {sorted(defaults)}")
        return {**defaults, **parameters}

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        """Returns what every batch must hold.

        Args:
            parameters: all hyper-parameters, as `complete_parameters` returns them.
        """
        return BatchRequirements()

    @classmethod
    def default_views(
        cls, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
    ) -> tuple[ViewGroup, ...]:
        """Returns the views of an image where a recipe does not say what they are: as many as `requirements` says.

        A method whose views differ from each other changes `augment` here, so that they suit the data set as it does.

        Args:
            augment: the augmentations of training images.
            image_size: the side of the encoder's images in pixels.
            parameters: all hyper-parameters, as `complete_parameters` returns them.
        """
        return (ViewGroup(cls.requirements(parameters).views, image_size, augment),)

    @classmethod
    def check_length(cls, epochs: int, ends_partial: bool, parameters: Mapping[str, Any]) -> None:
        """Checks the length of a training.

        Args:
            epochs: the epochs that begin; with `ends_partial` the last is cut off before its last step.
            ends_partial: see `epochs`.
            parameters: all hyper-parameters, as `complete_parameters` returns them.

        Raises:
            ValueError: the method cannot be trained for so long; the message starts with the parameter's name.
        """

    @classmethod
    def check_images(cls, images: int, parameters: Mapping[str, Any]) -> None:
        """Checks the number of images of a training, `TrainingInfo.size`, which is known once they are prepared.

        Args:
            images: the number of images trained on.
            parameters: all hyper-parameters, as `complete_parameters` returns them.

        Raises:
            ValueError: the method cannot be trained on so many; the message starts with the parameter's name.
        """

    @classmethod
    def list_warnings(cls, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns sentences about hyper-parameters that are allowed and known to fail, for users before a training.

        Args:
            parameters: all hyper-parameters, as `complete_parameters` returns them.
        """
        return ()

    @classmethod
    def plots(cls, epochs: int, parameters: Mapping[str, Any]) -> tuple[Plot, ...]:
        """Returns the plots of those logged metrics that need more than a line over the steps.

        Args:
            epochs: the epochs of the training that begin.
            parameters: all hyper-parameters, as `complete_parameters` returns them.
        """
        return ()

    def exported_encoder(self) -> Encoder:
        """Returns the encoder that is watched during the training, and that later stages receive.

        A method with a teacher may return the teacher's.
        """
        return self.encoder

    def exported_networks(self) -> dict[str, nn.Module]:
        """Returns the networks besides the encoder that later stages may start from, by name."""
        return {}

    def exported_tables(self) -> dict[str, SampleTable]:
        """Returns the tables that later stages may read, by name; the names differ from those of the networks.

        `bank` is a memory bank: a table of (size, dim) outputs of the network `head`.
        """
        return {}

    def predict(self, images: Tensor) -> Tensor | None:
        """Classifies (B, 3, H, W) images in 0..1 with the classifier that the method has learned from labels.

        Returns (B,) int64 classes, or None if the method has no classifier.
        """
        return None

    def measure_images(self, batch: Batch) -> dict[str, Tensor]:
        """Returns (B,) metrics by name: how well the method solves its task for each image of a held-out batch."""
        return {}

    def image_grids(self, batch: Batch, subject: str = "held-out images") -> tuple[ImageGrid, ...]:
        """Returns grids that show on images that were not trained on what was learned; () if there is nothing to show.

        `subject`: what these images are, for the titles.

        It is also called before the first step, for the rows of the untrained network. It runs in evaluation mode,
        without gradients, on rank 0 alone: an implementation uses no collectives and draws no random numbers.
        """
        return ()
