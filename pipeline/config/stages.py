"""Parts of the sections of stages: trainings, label budgets, references to encoders, frozen features.

Each kind of stage adds its own section, in its file in `pipeline/stages`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from firstlight.pipeline.config.measures import FrozenFeatures, Measure
from firstlight.pipeline.config.messages import SECTION_KEY
from firstlight.pipeline.config.optim import OptimizerSpec, ScheduleSpec
from firstlight.pipeline.config.schema import Augment, CheckedAugment, EncoderSection
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.data.splits import MEASURED_SPLITS

# The value of `encoder` that means the last stage before this one that makes an encoder.
PREVIOUS = "previous"
# The value of `encoder` that means the weights that `encoder.weights` names, and the value that means fresh weights.
GIVEN, RANDOM = "given", "random"
# The number formats of a forward pass, and what `auto` means on CPUs.
Precision = Literal["fp32", "bf16", "fp16", "auto"]
AUTO_ON_CPUS = (
    "on the CPUs of this machine `bf16` if they are faster in it (AMX; AVX512_BF16 of AMD), otherwise `fp32`."
)
FEATURE_PRECISION: Any = Field(
    "fp32",
    description="The number format in which the encoder computes the features: `bf16` and `fp16` are automatic mixed "
    "precision. A head, averages, and all that is done with the features are in `fp32`. `auto`: `bf16` on GPUs of this "
    f"machine that have it, and {AUTO_ON_CPUS}",
)
# The section of each registered kind of stage, by its kind. `pipeline/stages/registry.py` fills it.
STAGE_SECTIONS: dict[str, type["StageConfig"]] = {}


class StageConfig(StrictModel):
    """The section of a stage. Its properties and class attributes describe it to the other packages."""

    kind: str = Field(description="The kind of the stage; by default the name of the stage.")

    # True if later stages can start from an encoder that this stage makes.
    makes_encoder: ClassVar[bool] = False
    # True if later stages can take a fine-tuned model that this stage makes.
    makes_model: ClassVar[bool] = False
    # The values that leave the test split alone, by key, of a stage whose keys name splits.
    values_without_test: ClassVar[Mapping[str, str]] = {}
    # The keys of a training that can change in the middle of it, each with what stands below it.
    changeable_keys: ClassVar[tuple[str, ...]] = ()
    # The use that the stage makes of a finished encoder, as the end of "Use the encoder"; "" if it makes none.
    encoder_use: ClassVar[str] = ""
    # The help of the command `firstlight <kind>`.
    command_help: ClassVar[str] = ""
    # The comment on the stage in the file of a first recipe.
    recipe_comment: ClassVar[str] = ""

    @property
    def start(self) -> str | None:
        """The encoder that the stage starts from, as its key `encoder` names it; None if it starts from none.

        `Recipe.encoder_source` says what the name means in a recipe.
        """
        return None

    @classmethod
    def makes(cls, artifact: str) -> bool:
        """Returns True if later stages can take an artifact of the stage: an `encoder`, or a fine-tuned `model`."""
        return cls.makes_model if artifact == "model" else cls.makes_encoder

    @property
    def made_artifact(self) -> str:
        """The folder of the network that the stage makes: `model` (which contains an encoder), `encoder`, or ""."""
        return "model" if self.makes_model else "encoder" if self.makes_encoder else ""

    @property
    def takes_model(self) -> bool:
        """True if `encoder` names a fine-tuned model, which the stage takes as a whole."""
        return False

    @property
    def takes_given(self) -> bool:
        """True if the stage compares others with the weights that `encoder.weights` names."""
        return False

    def complete_arms(self, has_pretrained: bool, has_given: bool) -> "StageConfig":
        """Returns the stage with the arms that it leaves to the recipe: by whether there is a pretrained encoder for
        it, and whether the recipe names weights.

        Raises:
            ValueError: it names an arm that the recipe cannot have; the message starts with the key.
        """
        return self

    @property
    def keys_without_effect(self) -> frozenset[str]:
        """Keys that leave the result of the stage as it is: a finished stage stays finished when one changes."""
        return frozenset({"log_every", "checkpoint_every"})

    @property
    def has_plain_crops(self) -> bool:
        """True if all views of a training have the crop of its augmentations, and the size of the data set's images.

        False if only the kind of the stage knows its views.
        """
        return False

    @property
    def companions(self) -> tuple[str, ...]:
        """The artifacts of the pretraining that the stage needs besides the encoder: `head`, `decoder` or `bank`."""
        return ()

    @property
    def teacher(self) -> EncoderSection:
        """The section `method.teacher` of the frozen network that the stage learns from; None if there is none."""
        return None

    def choose_teacher_size(self, image_size: int) -> int:
        """Returns the side in pixels of the images that the teacher gets, by that of the encoder's."""
        return image_size

    def list_frozen_features(self, in_one_process: bool) -> FrozenFeatures | None:
        """Returns the features that the stage takes as other stages do, bit for bit; None if it takes none.

        `in_one_process`: whether one process on this machine computes the stage, so that its batches are `batch_size`.
        """
        return None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The scores of the stage, in the order of the tables."""
        return ()

    @property
    def measured_splits(self) -> frozenset[str]:
        """The splits that the stage measures anything on: of `val`, which are held-out images, and `test`.

        Images are kept apart for them. They are both by default if the stage has scores, else none.
        """
        return MEASURED_SPLITS if self.measures else frozenset()


def register_section(section: type[StageConfig]) -> str:
    """Registers the section of a kind of stage. Returns the kind: the only value of the section's field `kind`.

    Raises:
        ValueError: another section has this kind.
    """
    (kind,) = get_args(section.model_fields["kind"].annotation)
    known = STAGE_SECTIONS.get(kind, section)
    if (known.__module__, known.__qualname__) != (section.__module__, section.__qualname__):
        place = f"{known.__name__} of {known.__module__}"
        raise ValueError(f"{kind!r} is the kind of {place}; {section.__name__} needs another name")
    STAGE_SECTIONS[kind] = section
    return str(kind)


LengthUnit = Literal["epochs", "steps"]


@dataclass(frozen=True)
class TrainingLength:
    """The length of a training, or of a part of it: a number of epochs or of steps."""

    count: int
    unit: LengthUnit

    def __str__(self) -> str:
        return f"{self.count:,} {self.unit}"

    def count_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of optimiser steps."""
        return self.count * steps_per_epoch if self.unit == "epochs" else self.count

    def count_epochs(self, steps_per_epoch: int) -> int:
        """Returns the number of epochs that begin; the last may be partial."""
        return -(-self.count_steps(steps_per_epoch) // steps_per_epoch)


class TrainingOptions(StrictModel):
    """The options of one run of the training loop."""

    epochs: int | None = Field(
        None, ge=1, description="The number of passes over the training images. null: the length is in `steps`."
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="The number of optimiser steps, however many images there are; the last pass over them may be "
        "partial. null: the length is in `epochs`. One of the two is given.",
    )
    batch_size: int = Field(ge=2, description="The number of images in a global batch, the sum over all workers.")
    optimizer: OptimizerSpec = Field(description="The [optimiser](#optimisers).")
    schedule: ScheduleSpec | None = Field(
        None, description="The [learning rate schedule](#schedules). null: the rate is constant."
    )
    precision: Precision = Field(
        "fp32",
        description="The number format of the forward pass: `bf16` and `fp16` are automatic mixed precision, `fp16` "
        "with a scaled loss. In `bf16` on CPUs, grouped convolutions train in `fp32`. `auto`: `bf16` on GPUs that have "
        f"it, `fp16` on older ones, and {AUTO_ON_CPUS}",
    )
    ema: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="The momentum of an exponential moving average of the weights, for example 0.999. The averaged "
        "weights are those that are watched, scored and handed on. null: no average is kept.",
    )
    channels_last: bool = Field(
        False, description="true: images and convolutions use the memory format `channels_last`, which is often faster."
    )
    compile: bool = Field(False, description="true: the networks are compiled by torch.compile.")
    clip_norm: float | None = Field(
        None, gt=0.0, description="The largest norm of the gradient. A longer gradient is scaled down to it. null: any."
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="The number of parts in which each worker embeds its share of a batch. Memory is that of one part, "
        "the gradient is that of the whole batch (gradient caching).",
    )
    checkpoint_every: int = Field(
        0,
        ge=0,
        description="The number of steps between checkpoints. 0: at the ends of epochs, at most every 20 s.",
    )
    log_every: int = Field(10, ge=1, description="The number of steps between logged metrics.")
    augment: CheckedAugment | None = Field(
        None, description="The [augmentations](#augmentations) of the training. null: `dataset.train_augment`."
    )

    @model_validator(mode="after")
    def _check_length(self) -> "TrainingOptions":
        if self.epochs is None and self.steps is None:
            raise ValueError("neither epochs nor steps is given; valid: one of them")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"epochs: {self.epochs} and steps: {self.steps} are both given; valid: one of them, and null for the "
                f"other ({SECTION_KEY}.steps=null or {SECTION_KEY}.epochs=null)"
            )
        return self

    def list_augments(self) -> dict[str, Augment]:
        """Returns the augmentations that the section gives, by their key in it."""
        return {} if self.augment is None else {"augment": self.augment}

    @property
    def length(self) -> TrainingLength:
        """The length of the training, in the unit in which it is given."""
        if self.steps is not None:
            return TrainingLength(self.steps, "steps")
        assert self.epochs is not None
        return TrainingLength(self.epochs, "epochs")

    @property
    def learning_rate(self) -> float:
        """The learning rate at the start, before the schedule changes it."""
        return self.optimizer.compute_rate(self.batch_size)


KNN_TEMPERATURE: Any = Field(0.1, gt=0.0, description="The temperature of the neighbours' weights.")


class FeatureMonitorOptions(StrictModel):
    """Feature metrics on held-out images, logged during a pretraining.

    They change nothing of the training, but for `keep: best` and `early_stopping`.
    """

    every: int = Field(
        0, ge=0, description="The number of epochs between measurements; the last is at the end. 0: never."
    )
    measure: Literal["knn", "rankme"] = Field(
        "knn",
        description="The measure that `keep: best` and `early_stopping` follow: the accuracy of kNN on held-out "
        "images, or, where there are no labels, the effective rank of their features. Larger is better.",
    )
    features: Literal["encoder", "head"] = Field(
        "encoder", description="The features that are measured: of the encoder's deepest map, or of the method's head."
    )
    images: int = Field(
        5000, ge=2, description="The largest number of held-out images, and of training images that kNN searches."
    )
    knn_k: int = Field(20, ge=1, description="The number of neighbours of weighted kNN.")
    knn_temperature: float = KNN_TEMPERATURE


LABEL_KEYS = ("labels_per_class", "labels_fraction", "labels_subset")


class LabelBudget(StrictModel):
    """The training images whose labels are used. At most one key is given; if all are null, all labels are used."""

    labels_per_class: int | None = Field(
        None, ge=1, description="The number of labelled training images of each class, drawn by the seed."
    )
    labels_fraction: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="The fraction of the training images of each class that is labelled, rounded to the nearest image, "
        "at least one; drawn by the seed. 0.01 is 1 %.",
    )
    labels_subset: str | None = Field(
        None,
        min_length=1,
        description="The name of a subset that the data set itself defines. {seed} stands for the seed: fold{seed}.",
    )

    @model_validator(mode="after")
    def _check_one_key(self) -> "LabelBudget":
        given = self.labels_given
        if len(given) > 1:
            values = ", ".join(f"{key}: {value}" for key, value in given.items())
            raise ValueError(f"{values}: only one of {', '.join(LABEL_KEYS)} can be given, the others are null")
        return self

    @property
    def labels_given(self) -> dict[str, int | float | str]:
        """The key that is given and its value; {} if all labels are learned from."""
        return {key: getattr(self, key) for key in LABEL_KEYS if getattr(self, key) is not None}


class DownstreamStage(StageConfig):
    """A stage that starts from an encoder."""

    encoder: str = Field(
        PREVIOUS,
        pattern=rf"^({PREVIOUS}|{GIVEN}|runs:/[^/]+/.+|models:/.+)\z",
        description="The encoder to start from: `previous` is that of the last pretraining stage before this one, or "
        "`given` where there is none; `given` is that of `encoder.weights`; `runs:/<run>/encoder`, "
        "`models:/<name>@<alias>` and `models:/<name>/<version>` are in MLflow. A fine-tuned model, such as "
        "`runs:/<run>/model`, gives its encoder.",
    )

    @property
    def takes_encoder(self) -> bool:
        """True if the stage starts from the encoder; False if all its arms start from other weights."""
        return True

    @property
    def start(self) -> str | None:
        return self.encoder if self.takes_encoder else None
