"""The section of a stage that scores frozen features."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from firstlight.pipeline.config.comparison import FeatureStage
from firstlight.pipeline.config.measures import BANK_MEASURE, Measure
from firstlight.pipeline.config.schema import check_distinct
from firstlight.pipeline.config.stages import KNN_TEMPERATURE
from firstlight.pipeline.stages.sections.feature_measures import compare_features, describe_features, label_features


class Evaluate(FeatureStage):
    """Scores frozen features by weighted kNN and by a linear probe."""

    kind: Literal["evaluate"] = Field(description="The kind of the stage; by default the name of the stage.")
    layers: tuple[int, ...] = Field(
        (-1,),
        min_length=1,
        description="The encoder's maps that are evaluated, each on its own: 0 is the first, -1 the deepest.",
    )
    knn_k: int = Field(200, ge=1, description="The number of neighbours of weighted kNN.")
    knn_temperature: float = KNN_TEMPERATURE
    knn_bank: bool = Field(
        False,
        description="true: kNN is also scored over the memory bank that the method has kept of the training images, as "
        "the measure `knn_bank`; needs `features: head`. Its baseline are random weights, which have no bank: their "
        "training images are embedded.",
    )
    probe_weight_decays: tuple[Annotated[float, Field(ge=0.0)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1),
        min_length=1,
        description="The weight decays that the linear probe is trained with; the best on held-out images is scored.",
    )

    command_help: ClassVar[str] = "Run the evaluation stages: weighted kNN and linear probe."
    recipe_comment: ClassVar[str] = "kNN and a linear probe on frozen features, beside random weights."

    @property
    def has_plain_crops(self) -> bool:
        return True

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        return check_distinct(layers, "a layer")

    @property
    def layer_suffixes(self) -> tuple[str, ...]:
        """The suffix of a measure's name in the results, for each layer; "" where there is one layer."""
        return ("",) if len(self.layers) == 1 else tuple(f"_layer{layer}" for layer in self.layers)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.layers

    @property
    def companions(self) -> tuple[str, ...]:
        return (*super().companions, *(("bank",) if self.knn_bank else ()))

    @property
    def measures(self) -> tuple[Measure, ...]:
        labels = (("knn", "kNN", f"k={self.knn_k}"), ("probe", "linear probe", ""))
        found = tuple(
            compare_features(self, name + ending, label_features(label, detail, features))
            for ending, features in zip(self.layer_suffixes, describe_features(self), strict=True)
            for name, label, detail in labels
        )
        if not self.knn_bank:
            return found
        label = label_features("kNN", f"k={self.knn_k}", "memory bank")
        return (compare_features(self, BANK_MEASURE, label), *found)
