"""The section of the stage `pretrain`, and what follows from it alone."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.messages import SECTION_KEY
from firstlight.pipeline.config.schema import Augment, CheckedAugment, EncoderSection, MethodSpec
from firstlight.pipeline.config.schemas.entries import read_fact
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.config.stages import (
    GIVEN,
    PREVIOUS,
    RANDOM,
    FeatureMonitorOptions,
    LabelBudget,
    StageConfig,
    TrainingOptions,
)
from firstlight.pipeline.data.splits import MEASURED_SPLITS
from firstlight.pipeline.train.selection import SelectionOptions


class ViewOptions(StrictModel):
    """Views of an image that are made in the same way, each with random numbers of its own."""

    count: int = Field(1, ge=1, description="The number of views.")
    size: int | None = Field(
        None, ge=4, le=2048, description="The side of a view in pixels. null: `dataset.image_size`."
    )
    augment: CheckedAugment | None = Field(
        None, description="The [augmentations](#augmentations) of a view, in order. null: those of the stage."
    )


class Pretrain(StageConfig, TrainingOptions, LabelBudget):
    """Learns an encoder from images without labels, or with some."""

    kind: Literal["pretrain"] = Field(description="The kind of the stage; by default the name of the stage.")
    method: MethodSpec = Field(description="The [method](#methods).")
    encoder: str | None = Field(
        None,
        pattern=rf"^({PREVIOUS}|{GIVEN}|{RANDOM}|runs:/[^/]+/.+|models:/.+)\z",
        description="The encoder that the training continues; the method's head and tables start fresh. `given`: the "
        "weights that `encoder.weights` names. `previous`: that of the pretraining stage before this one. "
        "`runs:/<run>/encoder`, `models:/<name>@<alias>`, `models:/<name>/<version>`: one in MLflow. `random`: fresh "
        "weights. null: `given` where the recipe names weights, otherwise `random`.",
    )
    watch: FeatureMonitorOptions = Field(
        FeatureMonitorOptions(), description="[Feature metrics](#feature-metrics-watch) during the training."
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="The weights that are handed on: the last ones, or the best by `watch.measure` on held-out images "
        "among all that were measured. The weights that the training started from are one of them.",
    )
    early_stopping: int | None = Field(
        None,
        ge=1,
        description="The number of measurements of `watch.measure` in a row without a better one after which the "
        "training ends. null: it runs to its end.",
    )
    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="The factor of the learning rate from a feature map's layers to those of the map before it. The "
        "method's own layers, and those of the deepest map, have the rate itself.",
    )
    views: tuple[ViewOptions, ...] | None = Field(
        None,
        min_length=1,
        description="The [views](#views-of-an-image-views) of an image, in groups, for methods of several views: their "
        "counts add up to what the method takes. null: the method makes its views of `augment`, or of "
        "`dataset.train_augment`.",
    )
    first_view: Literal["augmented", "plain"] = Field(
        "augmented",
        description="The augmentations of the first view, for methods of several views. `plain`: "
        "`dataset.eval_augment`.",
    )
    labelled_per_batch: int = Field(
        0,
        ge=0,
        description="The number of labelled images in every batch of `batch_size` images. An epoch is a pass over the "
        "others, if there are any. 0: the method sees no label.",
    )
    max_unlabelled: int | None = Field(
        None,
        ge=1,
        description="The number of images beside the labelled ones, where a batch has both; drawn by the seed. A "
        "larger number adds to the images of a smaller one, and the labelled ones stay the same. null: all others.",
    )
    pictures: Literal["val", "test"] = Field(
        "val",
        description="The images that the method's figures show: held-out or test images. They change nothing of the "
        "training.",
    )
    register_as: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z",
        description="The name under which the encoder is registered in MLflow's model registry, with the alias "
        "`current`. null: it is not registered.",
    )

    command_help: ClassVar[str] = "Prepare the images, and run the pretraining stages."
    makes_encoder: ClassVar[bool] = True
    changeable_keys: ClassVar[tuple[str, ...]] = ("optimizer", "schedule", "method", "augment", "clip_norm")
    values_without_test: ClassVar[Mapping[str, str]] = {"pictures": "val"}

    @property
    def has_plain_crops(self) -> bool:
        is_own = self.views is None and self.first_view == "augmented"
        return is_own and bool(read_fact("methods", self.method.name, "keeps_crops"))

    @property
    def teacher(self) -> EncoderSection:
        return getattr(self.method, "teacher", None)

    def choose_teacher_size(self, image_size: int) -> int:
        return getattr(self.method, "teacher_size", None) or image_size

    @property
    def start(self) -> str | None:
        return self.encoder

    def complete_arms(self, has_pretrained: bool, has_given: bool) -> "Pretrain":
        """Returns the stage with its start: the given weights, or fresh ones."""
        return self if self.encoder else self.model_copy(update={"encoder": GIVEN if has_given else RANDOM})

    @property
    def keys_without_effect(self) -> frozenset[str]:
        return super().keys_without_effect | {"register_as"} | (set() if self.selection else {"watch"})

    def list_augments(self) -> dict[str, Augment]:
        groups = {f"views.{k}.augment": group.augment for k, group in enumerate(self.views or ())}
        return {**super().list_augments(), **{key: ops for key, ops in groups.items() if ops is not None}}

    @property
    def selection(self) -> SelectionOptions | None:
        """The measure that the weights are judged by during the training; None if they are not."""
        if self.keep == "last" and self.early_stopping is None:
            return None
        return SelectionOptions(f"watch_{self.watch.measure}", self.keep == "best", self.early_stopping)

    @model_validator(mode="after")
    def _check_selection(self) -> "Pretrain":
        if self.selection is not None and not self.watch.every:
            key = "keep: best" if self.keep == "best" else f"early_stopping: {self.early_stopping}"
            raise ValueError(
                f"{key} needs {SECTION_KEY}.watch.every: it is 0, so nothing is measured; valid: 1 or more"
            )
        return self

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The accuracy of the method's own classifier, what the method measures of held-out images, and the last values
        of what it logs.
        """
        found = [Measure("accuracy", "its own classifier", only_if_expected=True)] if self.labelled_per_batch else []
        for name in read_fact("methods", self.method.name, "image_metrics"):
            decibels = name == "psnr"
            label = f"{'PSNR (dB)' if decibels else name}, held-out images"
            found.append(Measure(name, label, scale=1.0 if decibels else 100.0, only_if_expected=True))
        reported = read_fact("methods", self.method.name, "reported_metrics")
        return (*found, *(Measure(name, name, only_if_expected=True) for name in reported))

    @property
    def measured_splits(self) -> frozenset[str]:
        """Both splits if the method learns a classifier; `val` if it watches features or measures each image."""
        if self.labelled_per_batch:
            return MEASURED_SPLITS
        held_out = self.watch.every > 0 or bool(read_fact("methods", self.method.name, "image_metrics"))
        return frozenset(["val"] * held_out + ["test"] * (self.pictures == "test"))
