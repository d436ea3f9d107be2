"""The recipe: stages in order, on one data set, with one encoder, at one scale.

A recipe is one YAML file. A section with a `name` (`dataset`, `scale`, a stage's `method` or `task`) starts from the
file of that name in its group, for example `conf/dataset/<name>.yaml`. The keys of the recipe replace those of the
file, and overrides replace both. Every stage starts from the section `defaults.<kind>` of its kind. The section `smoke`
replaces keys for a trial run of a minute (`load_recipe(..., smoke=True)`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)

from firstlight.pipeline.config.dataset import DatasetOptions, explain_refused_ops
from firstlight.pipeline.config.scale import ScaleOptions, StreamOptions, TrackingOptions
from firstlight.pipeline.config.schema import WEIGHT_KEYS, Augment, EncoderSection, check_distinct
from firstlight.pipeline.config.schemas.paper_results import ExpectedResult, ResourceEstimate
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.config.stages import (
    GIVEN,
    PREVIOUS,
    RANDOM,
    STAGE_SECTIONS,
    StageConfig,
    TrainingOptions,
)
from firstlight.pipeline.config.yaml_reader import LARGEST_INTEGER
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS
from firstlight.pipeline.data.mirror.places import (
    explain_missing_database,
    find_mirror,
    name_location,
    place_storage,
)
from firstlight.pipeline.data.splits import MEASURED_SPLITS
from firstlight.pipeline.errors import suggest_valid

CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class EncoderSource:
    """The origin of a stage's encoder: a stage of the same recipe, a model or run in MLflow, or the given weights."""

    stage: str | None = None
    reference: str | None = None
    # The kind of artifact that the stage of the same recipe has made: an encoder, or a fine-tuned model, which contains
    # one.
    artifact: Literal["encoder", "model"] = "encoder"
    # The weights that the recipe's key `encoder.weights` names.
    is_given: bool = False

    def __str__(self) -> str:
        if self.is_given:
            return "the given weights"
        return self.reference or f"of the stage {self.stage}"


def _find_source(stage: StageConfig, earlier: Mapping[str, StageConfig], has_given: bool) -> EncoderSource | None:
    """Returns where a stage takes its encoder from, as `Recipe.encoder_source` says.

    `earlier`: the stages before it.
    """
    artifact: Literal["encoder", "model"] = "model" if stage.takes_model else "encoder"
    if stage.start in (None, RANDOM):
        return None
    if stage.start == PREVIOUS:
        before = [other for other, its in earlier.items() if its.makes(artifact)]
        if before or artifact == "model" or not has_given:
            return EncoderSource(stage=before[-1] if before else None, artifact=artifact)
    if stage.start in (PREVIOUS, GIVEN):
        return EncoderSource(is_given=True)
    return EncoderSource(reference=stage.start, artifact=artifact)


class Recipe(StrictModel):
    """Stages in order, on one data set, with one encoder, at one scale."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z",
        description="The name of the recipe and of its folder in `storage`. It must not contain `..`.",
    )
    description: str = Field("", description="A text about the recipe, for people.")
    seeds: tuple[Annotated[int, Field(ge=0, le=LARGEST_INTEGER)], ...] = Field(
        (0,), min_length=1, description="The seeds that every stage is run with. No seed may occur twice."
    )
    storage: Path = Field(
        Path("runs"),
        description="The folder of stores, checkpoints, results and reports, which every node must see; or a URI "
        "(s3://bucket/prefix, gs://bucket/prefix, az://container/prefix), "
        "[which every machine mirrors](cluster.md#object-storage). A URI needs `tracking.uri`.",
    )
    tracking: TrackingOptions = Field(TrackingOptions(), description="[Where MLflow keeps the runs](#mlflow-tracking).")
    dataset: DatasetOptions = Field(description="[The images](#data-set-dataset).")
    encoder: EncoderSection = Field(
        None,
        description="[The network](#encoders) that is pretrained. Where every stage names its encoder in MLflow, the "
        "section, or any of its keys, can be left out: they are then those of the first of these encoders.",
    )
    stream: StreamOptions = Field(StreamOptions(), description="[How images reach the workers](#image-stream-stream).")
    scale: ScaleOptions = Field(description="[The machines](#machines-scale).")
    stages: dict[str, StageConfig] = Field(
        min_length=1, description="[The stages](#stages) by name, in the order in which they run."
    )
    score_test: bool = Field(
        True,
        description="false: no test image is read, and stages score held-out images only, as trials of a search do.",
    )
    expected: tuple[ExpectedResult, ...] = Field(
        (), description="[The numbers that the paper reports](#expected-results-expected)."
    )
    needs: ResourceEstimate | None = Field(
        None, description="[The data and machines that a full run needs](#resources-needs)."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if ".." in name:
            raise ValueError("must not contain '..'")
        return name

    @field_validator("storage", mode="wrap")
    @classmethod
    def _place_storage(cls, value: Any, check_path: ValidatorFunctionWrapHandler) -> Path:
        """Returns the folder that code works in; that of a URI is a working folder of this machine."""
        is_uri = isinstance(value, str) and "://" in value
        return cls._check_storage(place_storage(value) if is_uri else check_path(value))

    @field_serializer("storage")
    def _name_storage(self, storage: Path) -> str:
        return name_location(storage)

    @classmethod
    def _check_storage(cls, storage: Path) -> Path:
        """Checks that the path has no line break, which would break every message and table that names it."""
        if CONTROL_CHARACTER.search(str(storage)):
            raise ValueError("must not contain line breaks and other control characters")
        return storage

    @field_validator("encoder", mode="after")
    @classmethod
    def _share_channels(cls, encoder: EncoderSection, info: ValidationInfo) -> EncoderSection:
        """Gives the network the channels of the images, normalised by their colours unless the recipe states others."""
        dataset = info.data.get("dataset")
        if encoder is None or dataset is None:
            return encoder
        channels = dataset.channels or RGB_PIXELS.channels
        if encoder.channels not in (None, channels):
            raise ValueError(
                f"encoder.channels: {encoder.channels} is not valid, as images have {channels} (dataset.channels); "
                "valid: null, which stands for them"
            )
        if dataset.channels is None:
            return encoder
        unstated = [key for key in ("mean", "std") if key not in encoder.model_fields_set]
        return encoder.model_copy(update={"channels": channels, **dict.fromkeys(unstated)})

    @model_validator(mode="after")
    def _check_channel_ops(self) -> "Recipe":
        """Checks that augmentations of stages suit channels as they are; those of the data set are checked with it."""
        for name, stage in self.stages.items() if self.dataset.channels is not None else ():
            augments: dict[str, Augment] = stage.list_augments() if isinstance(stage, TrainingOptions) else {}
            for key, ops in augments.items():
                for reason in explain_refused_ops(ops):
                    raise ValueError(f"stages.{name}.{key}: {reason}")
            teacher = stage.teacher
            if teacher is not None and teacher.channels != self.dataset.channels:
                raise ValueError(
                    f"stages.{name}.method.teacher.channels: {teacher.channels} is not valid, as images have "
                    f"{self.dataset.channels} (dataset.channels); valid: {self.dataset.channels}"
                )
        return self

    @field_validator("stages")
    @classmethod
    def _check_stage_names(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        """Checks that stage names can be parts of folder names and of dotted keys."""
        for name in stages:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(
                    f"{name[:64]!r} is no name of a stage; valid: a letter or digit, "
                    "then up to 63 letters, digits, _ and -"
                )
        return stages

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return check_distinct(seeds, "a seed")

    @field_validator("stages", mode="after")
    @classmethod
    def _complete_arms(cls, stages: dict[str, StageConfig], info: ValidationInfo) -> dict[str, StageConfig]:
        """Fills in the arms that a stage leaves to the recipe: by what there is before it, and the given weights."""
        has_given = getattr(info.data.get("encoder"), "weights", None) is not None
        completed = dict[str, StageConfig]()
        for name, stage in stages.items():
            source = _find_source(stage, completed, has_given)
            is_made = any(other.makes_encoder for other in completed.values())
            has_pretrained = is_made or (source is not None and source.reference is not None)
            try:
                completed[name] = stage.complete_arms(has_pretrained, has_given)
            except ValueError as error:
                raise ValueError(f"stages.{name}.{error}") from None
        return completed

    @model_validator(mode="after")
    def _check_encoder_order(self) -> "Recipe":
        for name in self.stages:
            source = self.encoder_source(name)
            if source is not None and source.is_given and (self.encoder is None or self.encoder.weights is None):
                raise ValueError(
                    f"stages.{name}.encoder: {GIVEN!r} needs encoder.weights, the weights that it stands for; "
                    f"also valid: {PREVIOUS}, runs:/... or models:/..."
                )
            if source is not None and source.is_given and self.stages[name].companions:
                wanted = " and ".join(self.stages[name].companions)
                raise ValueError(
                    f"stages.{name}.encoder: the stage needs the {wanted} of a pretraining, and given weights have "
                    "none; valid: the encoder of a pretrain stage"
                )
            if source == EncoderSource(artifact=source.artifact if source else "encoder"):
                assert source is not None
                makers = " or ".join(kind for kind, one in STAGE_SECTIONS.items() if one.makes(source.artifact))
                raise ValueError(
                    f"stages.{name}.encoder: {PREVIOUS!r} needs a {makers} stage before it, or encoder.weights; "
                    "also valid: runs:/... or models:/..."
                )
        return self

    @model_validator(mode="after")
    def _check_encoder_section(self) -> "Recipe":
        if self.encoder is None and not self.takes_all_encoders:
            raise ValueError(
                "encoder: is missing and has no default; it can be left out only where every stage names its encoder "
                "in MLflow (stages.<name>.encoder)"
            )
        return self

    @model_validator(mode="after")
    def _check_database(self) -> "Recipe":
        if find_mirror(self.storage) is not None and self.tracking.uri is None:
            raise ValueError(explain_missing_database(self.storage))
        return self

    @model_validator(mode="after")
    def _check_expected(self) -> "Recipe":
        for k, row in enumerate(self.expected):
            if row.stage not in self.stages:
                raise ValueError(
                    f"expected.{k}.stage: {row.stage!r} is no stage of this recipe; "
                    f"{suggest_valid(row.stage, self.stages)}"
                )
            stage = self.stages[row.stage]
            measures = {measure.name: measure for measure in stage.measures}
            arms = {arm: None for measure in measures.values() for arm in measure.arms} or {"pretrained": None}
            if row.arm not in arms:
                raise ValueError(
                    f"expected.{k}.arm: {row.arm!r} is no arm of stages.{row.stage}; {suggest_valid(row.arm, arms)}"
                )
            if row.measure not in measures:
                raise ValueError(
                    f"expected.{k}.measure: {row.measure!r} is not measured by stages.{row.stage}; "
                    f"{suggest_valid(row.measure, measures or ['nothing'])}"
                )
        return self

    @model_validator(mode="after")
    def _check_test_split(self) -> "Recipe":
        for name, stage in self.stages.items() if not self.score_test else ():
            for key, valid in stage.values_without_test.items():
                if getattr(stage, key) != valid:
                    raise ValueError(
                        f"stages.{name}.{key}: {getattr(stage, key)!r} reads test images, and score_test is false; "
                        f"valid: {valid}"
                    )
        return self

    def encoder_source(self, name: str) -> EncoderSource | None:
        """Returns where the stage `name` takes its encoder from, None if it takes none, or one with fresh weights.

        `previous` is the last stage before it that makes an encoder, or a fine-tuned model if the stage takes one;
        where there is none, `given`. `given` are the weights that `encoder.weights` names; of a pretraining, fresh
        weights where it names none. Only this and the arms that a recipe completes read these words, by one function.
        """
        names, has_given = list(self.stages), self.encoder is not None and self.encoder.weights is not None
        earlier = {other: self.stages[other] for other in names[: names.index(name)]}
        return _find_source(self.stages[name], earlier, has_given)

    @property
    def network_spec(self) -> dict[str, Any]:
        """The spec of the encoder's network as JSON values: its section without the origin of its weights."""
        assert self.encoder is not None
        spec: dict[str, Any] = self.encoder.model_dump(mode="json", exclude=set(WEIGHT_KEYS))
        # Encoders of three channels were saved without them.
        if spec["channels"] in (None, RGB_PIXELS.channels):
            del spec["channels"]
        return spec

    @property
    def takes_given(self) -> bool:
        """True if a stage starts from the weights that `encoder.weights` names, or compares others with them."""
        sources = [self.encoder_source(name) for name in self.stages]
        starts = any(source is not None and source.is_given for source in sources)
        return starts or any(stage.takes_given for stage in self.stages.values())

    @property
    def takes_all_encoders(self) -> bool:
        """True if every stage starts from an encoder in MLflow, so that none builds one by the section `encoder`."""
        sources = [self.encoder_source(name) for name in self.stages]
        return all(source is not None and source.reference is not None for source in sources)

    @property
    def measured_splits(self) -> frozenset[str]:
        """The splits that a stage measures anything on: `val` (held-out images), `test`, both or none.

        It measures on both if the test split is left alone, as in a search: its trials train on the images of the whole
        recipe.
        """
        if not self.score_test:
            return MEASURED_SPLITS
        return frozenset(split for stage in self.stages.values() for split in stage.measured_splits)

    def dump(self) -> dict[str, Any]:
        """Returns the resolved recipe as plain JSON types: `parse_recipe(recipe.dump()) == recipe`."""
        return self.model_dump(mode="json")


def recipe_model() -> type[Recipe]:
    """Returns the model of a recipe whose stages have one of the registered kinds."""
    assert STAGE_SECTIONS, "no kind of stage is registered: import firstlight.pipeline.stages.registry first"
    return _recipe_model(tuple(STAGE_SECTIONS.values()))


@cache
def _recipe_model(sections: tuple[type[StageConfig], ...]) -> type[Recipe]:
    kinds: Any = Annotated[reduce(or_, sections), Field(discriminator="kind")]  # type: ignore[arg-type]
    return create_model("Recipe", __base__=Recipe, stages=(dict[str, kinds], Recipe.model_fields["stages"]))
