"""Measures: the numbers that a stage scores, as tables, recipes and searches name them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A score of a stage. A stage's kind says where its value is found: see `StageKind.read_score`."""

    # What a recipe's `expected` and a search call it, for example `knn_layer2`.
    name: str
    # What tables call it, for example `kNN (k=20)`.
    label: str
    # What is scored. Where there are several, the last one is the baseline of the others.
    arms: tuple[str, ...] = ("pretrained",)
    # What tables call the baseline; its name where this is empty.
    baseline_label: str = ""
    # The factor between the stored value and the displayed one: percent for shares, 1 for decibels.
    scale: float = 100.0
    # Whether the table shows it only where the recipe says what the paper reports.
    only_if_expected: bool = False
