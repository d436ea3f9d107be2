"""The section of a stage that writes embeddings."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from firstlight.pipeline.config.measures import PRETRAINED_ARM, FrozenFeatures
from firstlight.pipeline.config.schema import check_distinct
from firstlight.pipeline.config.stages import FEATURE_PRECISION, DownstreamStage, Precision
from firstlight.pipeline.stages.features.projection import MapProjection


class Embed(DownstreamStage):
    """Writes the embeddings of the images of a store as Parquet files."""

    kind: Literal["embed"] = Field(description="The kind of the stage; by default the name of the stage.")
    splits: tuple[Literal["train", "val", "test"], ...] = Field(
        ("train", "val", "test"), min_length=1, description="The splits whose images are embedded."
    )
    batch_size: int = Field(
        256,
        ge=1,
        description="The number of images that a worker embeds at a time. It can change the last bits of the results.",
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="The number format of the embeddings in the files."
    )
    precision: Precision = FEATURE_PRECISION
    rows_per_file: int = Field(
        16384,
        ge=1,
        description="The number of images of a file. A stage that was killed continues after its last complete file.",
    )
    map: MapProjection = Field(
        "pca", description="The projection of the embeddings to two dimensions in the stage's figure."
    )
    map_classes: tuple[str, ...] = Field((), description="The classes that the figure shows. []: all classes.")

    @property
    def has_plain_crops(self) -> bool:
        return True

    def list_frozen_features(self, in_one_process: bool) -> FrozenFeatures | None:
        features = FrozenFeatures((PRETRAINED_ARM,), False, "avg", (-1,), self.batch_size, self.precision)
        return features if in_one_process else None

    encoder_use: ClassVar[str] = "as vectors of the images"
    command_help: ClassVar[str] = "Run the embedding stages: write embeddings as Parquet."
    recipe_comment: ClassVar[str] = "Embeddings of all images as Parquet, and a map of them."

    @property
    def measured_splits(self) -> frozenset[str]:
        """The named splits, which are to have images; with `train` among them all images are embedded anyway."""
        return frozenset() if "train" in self.splits else frozenset(self.splits)

    @field_validator("splits", "map_classes")
    @classmethod
    def _check_distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return check_distinct(names, "a name")
