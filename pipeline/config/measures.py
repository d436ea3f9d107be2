"""Measures: the numbers that a stage scores, as tables, recipes and searches name them."""

from dataclasses import dataclass

# The arm of the weights that `encoder.weights` names, as they came.
GIVEN_ARM = "given"
# The measure of kNN over the memory bank.
BANK_MEASURE = "knn_bank"
# What tables and figures call the images of a split.
SHOWN_IMAGES = {"val": "held-out images", "test": "test images"}
# What tables and figures call weights that are no training; other arms are called by their names.
WEIGHTS_TITLES = {GIVEN_ARM: "given weights", "random": "random weights"}


@dataclass(frozen=True)
class Measure:
    """A score of a stage. A stage's kind says where its value is found: see `StageKind.read_score`."""

    # What a recipe's `expected` and a search call it, for example `knn_layer2`.
    name: str
    # What tables call it, for example `kNN (k=20)`.
    label: str
    # What is scored. Where there are several, the last one is the baseline of the others, and `given` is one of those
    # that are pretrained.
    arms: tuple[str, ...] = ("pretrained",)
    # What tables call the baseline; its name where this is empty.
    baseline_label: str = ""
    # The factor between the stored value and the displayed one: percent for shares, 1 for decibels.
    scale: float = 100.0
    # Whether the table shows it only where the recipe says what the paper reports.
    only_if_expected: bool = False

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The arms that are compared, each with its baseline: pretrained ones with the given weights, all with the
        last. Of `pretrained`, `given` and `random` these are all pairs.
        """
        *arms, last = self.arms
        given = GIVEN_ARM in arms
        return tuple(
            (arm, against)
            for arm in arms
            for against in ((GIVEN_ARM, last) if given and is_pretrained_arm(arm) else (last,))
        )


def is_pretrained_arm(arm: str) -> bool:
    """Returns True if an arm starts from the stage's `encoder`, perhaps with more that was pretrained with it."""
    return arm.startswith("pretrained")
