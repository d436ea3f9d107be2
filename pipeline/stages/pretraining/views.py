"""The views of an image in a pretraining: their sizes and augmentations, from the recipe or from the method."""

import torch

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.schema import Augment, View, constructor_arguments, parse_augment
from firstlight.pipeline.data.channels.channel_ops import keep_channel_ops
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import batch_requirements, default_views


def list_views(stage: Pretrain, dataset: DatasetOptions) -> list[View]:
    """Returns the views of an image in the order in which the method gets them.

    They are those of `stage.views`. If it is null, the method makes its own of the stage's augmentations, or of the
    data set's.
    """
    base = stage.augment or dataset.train_augment
    if stage.views is not None:
        views = [
            View(group.augment or base, group.size or dataset.image_size)
            for group in stage.views
            for _ in range(group.count)
        ]
    else:
        plain, parameters = tuple(op.model_dump() for op in base), constructor_arguments(stage.method)
        views = [
            View(_suit_channels(parse_augment(group.augment), dataset), group.size)
            for group in default_views(stage.method.name, plain, dataset.image_size, parameters)
            for _ in range(group.count)
        ]
    if stage.first_view == "plain":
        views[0] = views[0]._replace(augment=dataset.eval_augment)
    return views


def _suit_channels(augment: Augment, dataset: DatasetOptions) -> Augment:
    """Leaves out of the augmentations that a method adds what images with their channels as they are cannot have."""
    if dataset.channels is None:
        return augment
    kept, _ = keep_channel_ops([op.model_dump() for op in augment])
    return parse_augment(kept)


def list_dropped_ops(stage: Pretrain, dataset: DatasetOptions) -> list[str]:
    """Returns the names of the augmentations of the method's own that `list_views` leaves out of its views."""
    if stage.views is not None or dataset.channels is None:
        return []
    base, parameters = stage.augment or dataset.train_augment, constructor_arguments(stage.method)
    plain = tuple(op.model_dump() for op in base)
    groups = default_views(stage.method.name, plain, dataset.image_size, parameters)
    completed = ([op.model_dump() for op in parse_augment(group.augment)] for group in groups)
    return list(dict.fromkeys(name for ops in completed for name in keep_channel_ops(ops)[1]))


def check_views(where: str, stage: Pretrain, dataset: DatasetOptions, encoder: Encoder) -> list[View]:
    """Checks the views of a pretraining against its method and encoder, and returns them.

    Raises:
        UserError: they are more or fewer than the method takes, or the encoder cannot take their size; names the key.
    """
    required = batch_requirements(stage.method.name, constructor_arguments(stage.method)).views
    if stage.first_view == "plain" and required == 1:
        raise UserError(
            f"{where}.first_view: 'plain' is not valid: the method, as it is set, takes one view; valid: augmented"
        )
    if stage.first_view == "plain" and stage.views is not None:
        raise UserError(
            f"{where}.first_view: 'plain' is not valid with {where}.views; valid: augmented, and the augmentations of "
            "the first view in views"
        )
    views = list_views(stage, dataset)
    if len(views) != required:
        raise UserError(
            f"{where}.views: {len(views)} views of an image are not valid: the method, as it is set, takes {required}; "
            f"valid: counts that add up to {required}"
        )
    for size in sorted({view.size for view in views} - {encoder.image_size}):
        if not _takes_size(encoder, size):
            name = encoder.spec.get("model", encoder.spec["name"])
            advice = ", or encoder.dynamic_img_size: true" if encoder.spec["name"] == "timm" else ""
            raise UserError(
                f"{where}.views: a size of {size} pixels is not valid: {name} with images of {encoder.image_size} "
                f"pixels cannot take it; valid: {encoder.image_size}{advice}"
            )
    return views


@torch.no_grad()
def _takes_size(encoder: Encoder, size: int) -> bool:
    """Returns True if the encoder gives maps of images of another size than its own."""
    mode = encoder.training
    try:
        maps = encoder.eval()(torch.zeros(1, encoder.image_channels, size, size))
        return all(map_.numel() > 0 for map_ in maps)
    except (RuntimeError, AssertionError, ValueError):
        return False
    finally:
        encoder.train(mode)
