"""The section of a stage that trains a downstream task."""

import re
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from firstlight.pipeline.config.comparison import ComparisonStage
from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.schema import TaskSpec, check_distinct
from firstlight.pipeline.config.schemas.entries import read_fact
from firstlight.pipeline.config.scoring_views import ScoringViews
from firstlight.pipeline.config.stages import LabelBudget, TrainingOptions

# The weights that a fine-tuning starts from; the description of `arms` says what each name means.
Arm = Literal["pretrained", "pretrained_decoder", "given", "scratch", "gaussian", "he", "xavier", "lsuv"]
# The arms that are a way to draw all weights, those of the task's layers too.
DRAWN_ARMS = ("gaussian", "he", "xavier")


class Finetune(ComparisonStage, TrainingOptions, LabelBudget, ScoringViews):
    """Trains a downstream task from the pretrained encoder, and from scratch with the same budget and choice of
    settings.
    """

    kind: Literal["finetune"] = Field(description="The kind of the stage; by default the name of the stage.")
    task: TaskSpec = Field(description="The [task](#tasks).")
    arms: tuple[Arm, ...] | None = Field(
        None,
        min_length=1,
        description="The weights that trainings start from; the last arm is the baseline of the others, and `given` of "
        "the pretrained ones. `pretrained`: the encoder. `pretrained_decoder`: the encoder, and the decoder that was "
        "pretrained with it. `given`: the weights that `encoder.weights` names, as they came. `scratch`: fresh "
        "weights, drawn as `encoder.init` says. `gaussian`, `he`, `xavier`: fresh weights of these distributions, in "
        "the task's layers too. `lsuv`: an encoder of fresh weights scaled by the activations of the first training "
        "images. The task's layers are otherwise drawn as `task.init` says. null: `pretrained`, `given` and `scratch`, "
        "as far as the recipe has them.",
    )
    batch_norm: Literal["keep", "fold"] = Field(
        "keep",
        description="The batch normalisations of the encoder. `fold`: they are computed into the convolutions before "
        "them, as they are in evaluation mode, so that the network has none (NAT, section 4.2); in every arm.",
    )
    rescale: Literal["none", "new_layers", "all_layers"] = Field(
        "none",
        description="Rescaling of the first weights of every arm by the responses to the first training images "
        "(Krähenbühl et al. 2016), for networks without normalisations. `all_layers`: every channel of every layer is "
        "given a unit variance (their algorithm 1), then the layers are balanced so that all change at the same rate "
        "(algorithm 2). `new_layers`: a pretrained encoder is only balanced, as in their code. The layer that gives "
        "the predictions stays as it was drawn.",
    )
    class_groups: dict[str, tuple[str, ...]] = Field(
        {},
        description="Groups of classes by name, for example animals: the task's measure is also reported as the mean "
        "over the classes of each group, as <measure>_<name>.",
    )
    learning_rates: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(
        None,
        description="The learning rates that every arm is trained with; the best on held-out images is scored. null: "
        "`optimizer.lr`, a third of it and three times it. []: `optimizer.lr` only.",
    )

    register_as: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z",
        description="The name under which the fine-tuned model of the first arm is registered in MLflow's model "
        "registry, with the alias `current`: `firstlight predict models:/<name>@current` takes it, and as `encoder` a "
        "stage of another recipe starts from its encoder. null: it has no name.",
    )

    makes_model: ClassVar[bool] = True
    command_help: ClassVar[str] = "Run the fine-tuning stages, next to training from scratch."
    recipe_comment: ClassVar[str] = (
        "Fine-tuning with few labels, beside the same from scratch; all try a third and three times lr."
    )
    arm_names: ClassVar[tuple[str, ...]] = get_args(Arm)
    fresh_arm: ClassVar[str] = "scratch"

    @property
    def has_plain_crops(self) -> bool:
        return True

    @field_validator("learning_rates")
    @classmethod
    def _check_rates(cls, rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if rates is not None and len({f"{rate:g}" for rate in rates}) != len(rates):
            raise ValueError("must differ in their first six digits: the trainings are named by them")
        return rates

    @property
    def companions(self) -> tuple[str, ...]:
        return ("decoder",) if "pretrained_decoder" in self.compared_arms else ()

    @property
    def score_names(self) -> tuple[str, ...]:
        """The task's measure, and that of each group of classes."""
        measure = read_fact("tasks", self.task.name, "measure")
        return (measure, *(f"{measure}_{group}" for group in self.class_groups))

    @property
    def measures(self) -> tuple[Measure, ...]:
        task = self.task.name
        labels = {name: task if name == "accuracy" else f"{task} {name}" for name in self.score_names}
        return tuple(Measure(name, label, self.compared_arms) for name, label in labels.items())

    @field_validator("class_groups")
    @classmethod
    def _check_class_groups(cls, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, members in groups.items():
            if not re.fullmatch(r"[a-z][a-z0-9]*", name):
                raise ValueError(f"{name!r} is no name of a group; valid: small letters and digits")
            if not members:
                raise ValueError(f"{name} has no classes")
            check_distinct(members, "a class")
        return groups
