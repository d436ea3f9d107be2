"""Figures of a store: statistics of its images, a sample of them, and counts by class."""

from collections import Counter

from matplotlib.figure import Figure

from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report import figures, image_figures, overlay
from firstlight.pipeline.report.grid import display_names
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.visuals import describe_shown


def add_store_figures(figure_log: FigureLog, context: StageContext) -> None:
    """Adds all figures of the store to those of the prepare stage."""
    store = context.store
    figure_log.add(
        "images",
        figures.draw_store_statistics(store.images, store.quarantined),
        "sizes, modes and formats of the images",
    )
    figure_log.add("sample", _draw_sample(context), "training images, as the evaluation crops them")
    for name, (figure, title) in _class_figures(store, context).items():
        figure_log.add(name, figure, title)


def _class_figures(store: Store, context: StageContext) -> dict[str, tuple[Figure, str]]:
    """Returns figures and their titles by name: counts by class, and for a store with annotations a sample of them."""
    names = list(store.splits)
    found = {}
    if store.classes and not store.annotations:
        labels = [Counter(store.labels(name).tolist()) for name in names]
        found["classes"] = (
            figures.draw_class_counts({c: [part[k] for part in labels] for k, c in enumerate(store.classes)}, names),
            "images per class",
        )
    annotated = store.images.get("annotated", {})
    for kind, title in (
        ("present", "images in which a class occurs"),
        ("boxes", "boxes per class"),
        ("pixels", "pixels of masks per class"),
    ):
        if kind in {kind for split in annotated.values() for kind in split}:
            by_split = [annotated.get(name, {}).get(kind, {}) for name in names]
            by_class = {c: [n.get(str(k), 0) for n in by_split] for k, c in enumerate(store.classes)}
            found[f"classes_{kind}"] = figures.draw_class_counts(by_class, names, title), title
    if store.annotations:
        title = f"{store.path.name}: {', '.join(store.annotations)}"
        found["annotations"] = (
            overlay.draw_annotated_images(store, select_evenly_spaced(context.splits.train, 8), title),
            title,
        )
    return found


def _draw_sample(context: StageContext) -> Figure:
    """Draws up to 32 training images, as the evaluation crops them."""
    ids = select_evenly_spaced(context.splits.train, 32)
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0)
    batch = loader.load_once(ids)
    names = display_names(context.store.classes[k] if k >= 0 else "" for k in batch["label"].tolist())
    return image_figures.draw_captioned_images(
        list(image_figures.show_levels(batch["views"][:, 0])),
        names,
        f"{context.store.path.name}: training images{describe_shown(context.store.pixels.channels)}",
    )
