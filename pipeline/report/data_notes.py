"""Notes for the user about problems with the images of a recipe, and about images that a training leaves out."""

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import LabelBudget
from firstlight.pipeline.data.manifest import DUPLICATES_FILE, QUARANTINE_FILE
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.subsets import describe_lost_images
from firstlight.pipeline.stages.registry import stage_kind


def describe_problems(recipe: Recipe, store: Store) -> list[str]:
    """Returns lines about the problems with the images of a store."""
    copies = store.images["duplicates"]
    notes = (
        [f"{recipe.dataset.list or recipe.dataset.root}: {store.source['aside']}"] if "aside" in store.source else []
    )
    if store.quarantined:
        notes.append(f"{store.quarantined:,} images cannot be decoded, listed in {store.path / QUARANTINE_FILE}")
    if lost := describe_lost_images(store.subsets):
        notes.append(f"subsets are smaller by images that cannot be decoded: {', '.join(lost)}")
    if copies["copies"]:
        both = f"{copies['of_train_in_test']:,} of them test images that are also in train, "
        notes.append(
            f"{copies['copies']:,} images are copies of others, {both}listed in {store.path / DUPLICATES_FILE}"
        )
    return notes


def describe_left_out(recipe: Recipe, name: str, splits: Splits) -> list[str]:
    """Returns lines about the images that the trainings of a stage leave out."""
    stage, notes = recipe.stages[name], list[str]()
    counts = [stage_kind(stage).count_epoch_images(stage, splits, seed) for seed in recipe.seeds]
    epochs = [count for count in counts if count is not None]
    if not epochs:
        return notes
    if isinstance(stage, LabelBudget) and stage.labels_subset:
        withheld = {splits.count_withheld(stage, seed) for seed in recipe.seeds}
        if withheld != {0}:
            why = "are held out (dataset.val_fraction), or have no label"
            notes.append(f"stages.{name}.labels_subset: {_range(withheld)} images of {stage.labels_subset!r} {why}")
    tails, images = {count % batch for count, batch in epochs}, {count for count, _ in epochs}
    if tails != {0}:
        why = "(fewer than a batch), others each time"
        notes.append(f"stages.{name}: each epoch leaves out {_range(tails)} of {_range(images)} images {why}")
    return notes


def _range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
