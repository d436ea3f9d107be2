"""Measurements and pictures of a method after its training."""

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.measures import SHOWN_IMAGES
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.stages.features.projection import project_principal
from firstlight.pipeline.stages.pictures import NUM_VIEWED_IMAGES
from firstlight.pipeline.stages.pretraining.job import batch_requirements_of
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import pool_maps
from firstlight.tasks.pretrain.method import Method
from firstlight.tasks.visuals import ImageGrid

PRETRAIN_MAP_FILE = "map.safetensors"

# The most held-out images that are compared with each other.
MAX_COMPARED_IMAGES = 1000


@torch.no_grad()
def score_classifier(context: StageContext, stage: Pretrain, method: Method) -> dict[str, float]:
    """Returns the accuracy of the classifier that the method learned from labels, on held-out and test images; {} if it
    has none. It is collective.
    """
    found: dict[str, float] = {}
    if not batch_requirements_of(stage).labels:
        return found
    for part, ids in (
        ("val", context.splits.val),
        ("test", context.splits.test if context.recipe.score_test else context.splits.test[:0]),
    ):
        ids = context.splits.with_target(ids, "label")
        if len(ids) >= world_size():
            batches = context.iterate_batches(ids, max(stage.batch_size, 256))
            right = [_find_right_predictions(method, batch) for batch in batches]
            found[part] = float(gather_rows(right, len(ids)).mean())
    return found


def _find_right_predictions(method: Method, batch: Batch) -> Tensor:
    """Returns (B,) float64: 1 where the classifier of the method names the label of an image."""
    predicted = method.predict(batch.views[0])
    assert predicted is not None, "it has learned from labels"
    return (predicted == batch.labels).double()


@torch.no_grad()
def draw_method_pictures(
    context: StageContext, stage: Pretrain, method: Method, instance: StageInstance, device: torch.device
) -> tuple[ImageGrid, ...]:
    """Returns what the method, on `device`, draws of held-out or test images; nothing on ranks other than 0."""
    # Test images may be sorted by class.
    test = select_evenly_spaced(context.splits.test, NUM_VIEWED_IMAGES)
    ids = test if stage.pictures == "test" else context.splits.figure_ids[:NUM_VIEWED_IMAGES]
    subject = (
        "training images" if stage.pictures == "val" and not len(context.splits.val) else SHOWN_IMAGES[stage.pictures]
    )
    if rank() != 0 or len(ids) == 0:
        return ()
    batch = to_batch(context.build_loader([context.recipe.dataset.eval_augment], instance.seed).load_once(ids), device)
    return method.eval().image_grids(batch, subject)


@torch.no_grad()
def compute_held_out_features(
    context: StageContext, stage: Pretrain, method: Method
) -> tuple[np.ndarray, Tensor] | None:
    """Returns the ids of held-out images, or training images where none is held out, and their (n, C) features.

    The features are those of single precision. Returns None if there are too few to compare, or a feature is not
    finite. It is collective.
    """
    ids = select_evenly_spaced(context.splits.figure_ids, MAX_COMPARED_IMAGES)
    if len(ids) < max(world_size(), 3):
        return None
    method.eval()
    parts = [
        pool_maps(method.exported_encoder()(batch.views[0]), "avg").float()
        for batch in context.iterate_batches(ids, max(stage.batch_size, 256))
    ]
    features = gather_rows(parts, len(ids))
    return (ids, features) if bool(torch.isfinite(features).all()) else None


def save_pretrain_map(instance: StageInstance, ids: np.ndarray, features: Tensor) -> None:
    points, share = project_principal(features.cpu().numpy())
    found = {"ids": ids, "points": points, "share": share}
    write_atomically(
        instance.folder / PRETRAIN_MAP_FILE,
        save_tensors({name: torch.from_numpy(array.copy()) for name, array in found.items()}),
    )


@torch.no_grad()
def measure_held_out(context: StageContext, stage: Pretrain, method: Method) -> dict[str, float]:
    """Returns the means over held-out images of the method's metrics of each; {} if it has none. It is collective."""
    ids = context.splits.val
    if not method.image_metrics or len(ids) < world_size():
        return {}
    size = stage.batch_size // (world_size() * stage.accumulate)  # what fits into memory in the training
    seen = [method.measure_images(batch) for batch in context.iterate_batches(ids, size)]
    return {
        name: float(gather_rows([found[name].double() for found in seen], len(ids)).mean())
        for name in method.image_metrics
    }
