"""The views that held-out and test images are scored in, and that a fine-tuned model sees images in."""

from firstlight.pipeline.config.schema import Augment
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.train.context import StageContext


def list_scored_views(context: StageContext, stage: Finetune) -> list[Augment]:
    """Returns the augmentations of the views of a held-out or test image; its answers are averaged over them."""
    if stage.scored_pixels == "image":
        return stage.build_covering_windows(context.read_mask_sizes())
    if stage.test_crops == 1:
        return [context.recipe.dataset.eval_augment]
    return (
        stage.build_corner_crops()
        if stage.test_crop == "corners"
        else context.list_view_augments(stage, stage.test_crops)
    )


def describe_preprocessing(context: StageContext, stage: Finetune) -> Preprocessing:
    """Returns how the fine-tuned model sees an image: in the views that test images are scored by."""
    data, is_whole = context.recipe.dataset, stage.scored_pixels == "image"
    views = [data.eval_augment] if is_whole else list_scored_views(context, stage)
    return Preprocessing(
        data.image_size,
        tuple(tuple(op.model_dump(mode="json") for op in ops) for ops in views),
        {"scale": stage.test_scale, "size": stage.test_size} if is_whole else None,
        data.max_pixels,
        context.store.levels,
        context.store.stated_pixels,
    )
