"""The section of a stage that searches for the nearest images."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from firstlight.pipeline.config.comparison import FeatureStage
from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.stages.sections.feature_measures import compare_features, describe_features, label_features


class Retrieve(FeatureStage):
    """Writes an index of a gallery's features, and scores how many of the images nearest to a query have its class."""

    kind: Literal["retrieve"] = Field(description="The kind of the stage; by default the name of the stage.")
    layer: int = Field(-1, description="The encoder's map whose features are compared: 0 is the first, -1 the deepest.")
    gallery: Literal["train", "test", "all"] = Field(
        "train",
        description="The images that are searched. `all`: training, held-out and test images.",
    )
    labelled_gallery: bool = Field(
        False,
        description="true: images without a label are left out of the gallery. Every image found is then known "
        "to be of the query's class or of another; unlabelled ones are found without being scored.",
    )
    queries: Literal["val", "test"] = Field(
        "test", description="The images that are searched for. A query that is in the gallery does not find itself."
    )
    precision_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 10, 20), min_length=1, description="The numbers of nearest images k of the scores precision@k."
    )

    command_help: ClassVar[str] = "Run the retrieval stages: an index and the nearest images."
    recipe_comment: ClassVar[str] = "An index of the embeddings, and the images nearest to some of them."
    values_without_test: ClassVar[Mapping[str, str]] = {"queries": "val", "gallery": "train"}

    @property
    def has_plain_crops(self) -> bool:
        return True

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def measures(self) -> tuple[Measure, ...]:
        (features,) = describe_features(self)
        names = [f"precision@{k}" for k in self.precision_at]
        return tuple(compare_features(self, name, label_features(name, features)) for name in names)

    @property
    def measured_splits(self) -> frozenset[str]:
        return frozenset((self.queries, *(["test"] if self.gallery != "train" else [])))
