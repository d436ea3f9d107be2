"""Measures of frozen features, and what tables call them."""

from firstlight.pipeline.config.comparison import FeatureStage
from firstlight.pipeline.config.measures import WEIGHTS_TITLES, Measure


def describe_features(stage: FeatureStage) -> list[str]:
    """Returns words for the features of each layer of a stage; "" for those of the deepest map alone."""
    if stage.features == "head":
        return ["head"]
    return ["" if stage.feature_layers == (-1,) else f"layer {layer}" for layer in stage.feature_layers]


def compare_features(stage: FeatureStage, name: str, label: str) -> Measure:
    """Returns a measure of the features of all arms of a stage."""
    return Measure(name, label, stage.compared_arms, WEIGHTS_TITLES.get(stage.compared_arms[-1], ""))


def label_features(measure: str, *details: str) -> str:
    """Returns what tables call a measure of features: `kNN (k=20, layer 2)`."""
    text = ", ".join(detail for detail in details if detail)
    return f"{measure} ({text})" if text else measure
