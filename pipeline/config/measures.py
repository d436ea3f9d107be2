"""Measures: the numbers that a stage scores, as tables, recipes and searches name them."""

from dataclasses import dataclass
from typing import NamedTuple

# The arm of the weights that `encoder.weights` names, as they came.
GIVEN_ARM = "given"
# The arm of the encoder that the stage starts from.
PRETRAINED_ARM = "pretrained"
# The measure of kNN over the memory bank.
BANK_MEASURE = "knn_bank"
# The names of the images of a split in tables and figures.
SHOWN_IMAGES = {"val": "held-out images", "test": "test images"}
# The names in tables and figures of weights that are no training; other arms are called by their names.
WEIGHTS_TITLES = {GIVEN_ARM: "given weights", "random": "random weights"}


@dataclass(frozen=True)
class Measure:
    """A score of a stage. A stage's kind says where its value is found: see `StageKind.read_score`."""

    # The name in a recipe's `expected` and in a search, for example `knn_layer2`.
    name: str
    # The name in tables, for example `kNN (k=20)`.
    label: str
    # The arms that are scored. If there are several, the last one is the baseline of the others, and `given` is one of
    # those that are pretrained.
    arms: tuple[str, ...] = (PRETRAINED_ARM,)
    # The name of the baseline in tables; the name of its arm is used if this is empty.
    baseline_label: str = ""
    # The factor between the stored value and the displayed one: percent for shares, 1 for decibels.
    scale: float = 100.0
    # True if the table shows it only where the recipe says what the paper reports.
    only_if_expected: bool = False

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The arms that are compared, each with its baseline: pretrained ones with the given weights, all with the
        last. The arms `pretrained`, `given` and `random` are thus compared in all pairs.
        """
        *arms, last = self.arms
        given = GIVEN_ARM in arms
        return tuple(
            (arm, against)
            for arm in arms
            for against in ((GIVEN_ARM, last) if given and is_pretrained_arm(arm) else (last,))
        )


class FrozenFeatures(NamedTuple):
    """Features that a stage takes of frozen networks."""

    arms: tuple[str, ...]
    # True for the output of the method's head, which pools the deepest map and gives one output.
    head: bool
    pool: str
    # The indices of the encoder's maps.
    layers: tuple[int, ...]
    batch_size: int
    precision: str


def is_pretrained_arm(arm: str) -> bool:
    """Returns True if an arm starts from the stage's `encoder`, perhaps with more that was pretrained with it."""
    return arm.startswith("pretrained")
