"""Notes for the user about problems with the images of a recipe, and about images that a training leaves out."""

from collections.abc import Mapping, Sequence

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scoring_views import ScoringViews
from firstlight.pipeline.config.stages import LabelBudget, TrainingOptions
from firstlight.pipeline.data.manifest import DUPLICATES_FILE, QUARANTINE_FILE
from firstlight.pipeline.data.readings import describe_readings, describe_refused
from firstlight.pipeline.data.sources.conventions.reading import count_things
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.subsets import describe_lost_images
from firstlight.pipeline.stages.registry import stage_kind


def describe_problems(recipe: Recipe, store: Store) -> list[str]:
    """Returns lines about the problems with the images of a store."""
    copies = store.images["duplicates"]
    where = recipe.dataset.list or recipe.dataset.root
    found = [*([store.source["aside"]] if "aside" in store.source else []), *store.source.get("notes", [])]
    notes = [f"{where}: {line}" for line in found]
    if "identity" not in store.source and where is not None:
        notes.append(
            f"{store.path} was written by an earlier version, which compared names, sizes and times of files and no "
            "bytes: it is used as it is; delete it to have it written again"
        )
    notes += describe_kept_apart(recipe, store)
    if store.quarantined:
        why = describe_refused(store.images)
        count = count_things(store.quarantined, "image")
        notes.append(f"{count} cannot be decoded{why}, listed in {store.path / QUARANTINE_FILE}")
    if recipe.dataset.depth is not None and not store.levels:
        notes.append(f"dataset.depth: {recipe.dataset.depth} has no effect: no image has more than 8 bits a sample")
    notes += describe_readings(store.images, store.classes)
    for name, stage in recipe.stages.items():
        notes += stage_kind(stage).list_image_notes(name, stage, recipe.dataset)
    if lost := describe_lost_images(store.subsets):
        notes.append(f"subsets are smaller by images that cannot be decoded: {', '.join(lost)}")
    if copies["copies"]:
        both = f"{copies['of_train_in_test']:,} of them test images that are also in train, "
        notes.append(f"copies of other images: {copies['copies']:,}, {both}listed in {store.path / DUPLICATES_FILE}")
    return notes + describe_crops(recipe, store)


def describe_kept_apart(recipe: Recipe, store: Store) -> list[str]:
    """Returns a line about images that are trained on, as nothing is measured on them."""
    dataset, measured = recipe.dataset, recipe.measured_splits
    merged = "test" not in measured and dataset.test_fraction is None and store.source.get("draws_test")
    unheld = "val" not in measured and dataset.val_fraction is None and not store.splits.get("val")
    if not merged and not unheld:
        return []
    what = " or ".join(["test images"] * bool(merged) + ["held-out images"] * unheld)
    keys = " and ".join(["dataset.test_fraction=0.2"] * bool(merged) + ["dataset.val_fraction=0.1"] * unheld)
    note = f"no stage measures anything on {what}: such are trained on, too; {keys} keeps them apart for later recipes"
    return [note]


def describe_seen_images(recipe: Recipe, encoders: Mapping[str, str]) -> list[str]:
    """Returns a line for each encoder that was trained on all images of this store, also on those of tests.

    `encoders`: the references of such encoders, by the name of the stage that takes them.
    """
    return [
        f"stages.{name}.encoder: {reference} was trained on all images of this store, without labels, also on those "
        "that this recipe measures on: its scores are too good for new images"
        for name, reference in encoders.items()
        if recipe.stages[name].measured_splits
    ]


def describe_crops(recipe: Recipe, store: Store) -> list[str]:
    """Returns lines about crops in pixels that are larger than images, and about those that resample for a rounded
    share of a pixel.
    """
    shortest = min(min(store.images[side]) for side in ("width", "height"))
    crops = {"dataset.train_augment": recipe.dataset.train_augment, "dataset.eval_augment": recipe.dataset.eval_augment}
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainingOptions):
            crops |= {f"stages.{name}.{key}": ops for key, ops in stage.list_augments().items()}
        if isinstance(stage, ScoringViews) and (stage.test_scale or stage.test_size):
            crops[f"stages.{name}.{'test_size' if stage.test_size else 'test_scale'}"] = stage.build_corner_crops()[0]
    notes = []
    for key, (crop, *_) in crops.items():
        size, scale = getattr(crop, "size", None), getattr(crop, "scale", None)
        if size is not None and size > shortest:
            notes.append(
                f"{key}: {crop.op} takes {size} pixels, and images have sides from {shortest} pixels on: a smaller "
                "image gives its largest square, scaled up"
            )
        if store.common_size and isinstance(scale, float):
            side, wanted = scale * shortest, recipe.dataset.image_size
            if side != wanted and abs(side - wanted) < 0.5:
                notes.append(
                    f"{key}: {crop.op} resamples {side:.7g} pixels ({scale:g} of {shortest}) to {wanted}; a size of "
                    f"{wanted} pixels copies them"
                )
    return notes


def describe_left_out(recipe: Recipe, name: str, splits: Splits) -> list[str]:
    """Returns lines about the images that the trainings of a stage leave out, and about their passes over the images
    where their length is in steps.
    """
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
    if isinstance(stage, TrainingOptions) and stage.steps is not None:
        labelled = [stage_kind(stage).count_labelled_images(stage, splits, seed) for seed in recipe.seeds]
        beside = [count for count in labelled if count is not None]
        also = f" and {_describe_passes(stage.steps, beside, 'labelled images')}" if beside else ""
        passes = _describe_passes(stage.steps, epochs, "images")
        notes.append(f"stages.{name}.steps: {stage.steps:,} steps are {passes}{also}")
    return notes


def _describe_passes(steps: int, counts: Sequence[tuple[int, int]], what: str) -> str:
    """Returns the number of passes that so many steps are.

    `counts`: for each seed, how many images a pass is drawn from, and how many of them a batch takes.
    """
    passes = [steps / (count // batch) for count, batch in counts]
    low, high = f"{min(passes):,.1f}", f"{max(passes):,.1f}"
    return f"{low if low == high else f'{low} to {high}'} passes over {_range({count for count, _ in counts})} {what}"


def _range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
