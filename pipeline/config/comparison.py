"""Sections of stages that do the same with several networks, the arms: pretrained, given and fresh weights."""

from typing import ClassVar, Literal, get_args

from pydantic import Field, field_validator

from firstlight.pipeline.config.measures import GIVEN_ARM, FrozenFeatures, is_pretrained_arm
from firstlight.pipeline.config.schema import check_distinct
from firstlight.pipeline.config.stages import (
    FEATURE_PRECISION,
    GIVEN,
    RANDOM,
    DownstreamStage,
    Precision,
    StageConfig,
)
from firstlight.tasks.nn import Pool


class ComparisonStage(DownstreamStage):
    """A stage that does the same with several networks, the arms, and compares their scores."""

    arms: tuple[str, ...] | None = Field(
        None, min_length=1, description="The networks that are compared. null: those that the recipe has."
    )

    # The names of all arms, and that of fresh weights, which are the baseline of the others.
    arm_names: ClassVar[tuple[str, ...]]
    fresh_arm: ClassVar[str]

    @field_validator("arms")
    @classmethod
    def _check_distinct_arms(cls, arms: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return arms if arms is None else check_distinct(arms, "an arm")

    @property
    def compared_arms(self) -> tuple[str, ...]:
        """The arms in order. They are the encoder and fresh weights until the recipe has completed them."""
        return self.arms if self.arms is not None else ("pretrained", self.fresh_arm)

    @property
    def takes_encoder(self) -> bool:
        return any(is_pretrained_arm(arm) for arm in self.compared_arms)

    @property
    def takes_given(self) -> bool:
        return GIVEN_ARM in self.compared_arms

    def complete_arms(self, has_pretrained: bool, has_given: bool) -> "StageConfig":
        # An encoder that is the given one is no arm of its own.
        has_pretrained = has_pretrained and self.encoder != GIVEN
        if self.arms is not None:
            self._check_named_arms(has_pretrained, has_given)
            return self
        # The arms stay if there are neither: the check of the key `encoder` then says what is missing.
        has_pretrained = has_pretrained or not has_given
        given = (GIVEN_ARM,) if has_given and self.can_take_given else ()
        arms = (*(("pretrained",) if has_pretrained else ()), *given, self.fresh_arm)
        return self.model_copy(update={"arms": arms})

    @property
    def can_take_given(self) -> bool:
        """True if the given weights, which are those of an encoder alone, can do what the stage does with an arm."""
        return True

    def _check_named_arms(self, has_pretrained: bool, has_given: bool) -> None:
        """Checks that the recipe has the arms that the stage names.

        Raises:
            ValueError: it lacks one; the message starts with the key.
        """
        valid = [
            arm
            for arm in self.arm_names
            if (has_pretrained or not is_pretrained_arm(arm)) and (has_given or arm != GIVEN_ARM)
        ]
        if self.takes_given and not has_given:
            raise ValueError(
                f"arms: {GIVEN_ARM!r} is not valid: the recipe names no weights (encoder.weights); valid: "
                f"{', '.join(valid)}"
            )
        if self.takes_encoder and has_given and not has_pretrained:
            arm = next(arm for arm in self.compared_arms if is_pretrained_arm(arm))
            raise ValueError(
                f"arms: {arm!r} is not valid: no stage before this one pretrains, and `encoder` names no other "
                f"encoder; valid: {', '.join(valid)}"
            )


FeatureArm = Literal["pretrained", "given", "random"]


class FeatureStage(ComparisonStage):
    """A stage that evaluates frozen features, and for comparison those of other weights of the same network."""

    arms: tuple[FeatureArm, ...] | None = Field(
        None,
        min_length=1,
        description="The weights whose features are compared, each pair with a verdict; the order is that of this "
        "list. `pretrained`: the encoder. `given`: the weights that `encoder.weights` names, as they came; not with "
        "`features: head`, as they come without a head. `random`: fresh weights, drawn from the seed. null: all that "
        "the recipe has.",
    )
    features: Literal["encoder", "head"] = Field(
        "encoder",
        description="The features: the encoder's maps, or the output of the method's head on the deepest map.",
    )
    pool: Pool = Field(
        "avg",
        description="How a map becomes a vector: `avg` is its mean, `grid` its means over the finest grid that gives "
        "at most 10,000 features.",
    )
    batch_size: int = Field(
        256, ge=1, description="The number of images that are embedded at a time, over all workers."
    )
    precision: Precision = FEATURE_PRECISION

    arm_names: ClassVar[tuple[str, ...]] = get_args(FeatureArm)
    fresh_arm: ClassVar[str] = RANDOM

    @field_validator("arms")
    @classmethod
    def _sort_arms(cls, arms: tuple[FeatureArm, ...] | None) -> tuple[FeatureArm, ...] | None:
        return arms if arms is None else tuple(sorted(arms, key=cls.arm_names.index))

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The indices of the encoder's maps whose features are taken."""
        raise NotImplementedError

    def list_frozen_features(self, in_one_process: bool) -> FrozenFeatures:
        head = self.features == "head"
        # A head pools the deepest map, and gives one output.
        pool, layers = ("head", (-1,)) if head else (self.pool, self.feature_layers)
        return FrozenFeatures(self.compared_arms, head, pool, layers, self.batch_size, self.precision)

    @property
    def companions(self) -> tuple[str, ...]:
        return ("head",) if self.features == "head" else ()

    @property
    def can_take_given(self) -> bool:
        return self.features == "encoder"

    def complete_arms(self, has_pretrained: bool, has_given: bool) -> "StageConfig":
        completed = super().complete_arms(has_pretrained, has_given)
        assert isinstance(completed, FeatureStage)
        if completed.features == "head" and not completed.takes_encoder:
            raise ValueError(
                "features: 'head' is not valid without the arm pretrained, whose pretraining makes the head; "
                "valid: encoder"
            )
        if completed.features == "head" and completed.takes_given:
            raise ValueError(
                f"arms: {GIVEN_ARM!r} is not valid with features: head: the weights come without a head, and a fresh "
                f"one would be measured; valid: pretrained, {RANDOM}, or features: encoder"
            )
        return completed
