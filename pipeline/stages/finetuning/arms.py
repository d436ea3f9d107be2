"""The networks that the arms of a fine-tuning start from."""

import torch
from torch import Tensor

from firstlight.pipeline.config.measures import GIVEN_ARM, is_pretrained_arm
from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.stages.artifacts.companions import load_decoder
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.finetuning.job import finetune_ids, load_eval_batch
from firstlight.pipeline.stages.sections.finetune import DRAWN_ARMS, Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.starting_weights import count_response_images, fold_encoder, rescale_task
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weight_init import initialize_lsuv

# The number of training images that `lsuv` scales by.
NUM_LSUV_IMAGES = 64


def build_arm_task(context: StageContext, stage: Finetune, instance: StageInstance, arm: str) -> Task:
    """Builds the task on the encoder of an arm, a loaded or a fresh one.

    All fresh weights are drawn from the seed, so the arms share those of the head, unless an arm is a way to draw them.
    """
    size, spec = context.recipe.dataset.image_size, context.recipe.network_spec
    torch.manual_seed(instance.seed)
    encoder = Encoder({**spec, "init": arm} if arm in DRAWN_ARMS else spec, size)
    if arm == "lsuv":
        initialize_lsuv(encoder, _first_images(context, stage, instance))
    is_loaded = is_pretrained_arm(arm) or arm == GIVEN_ARM
    if is_loaded:
        folder = instance.given if arm == GIVEN_ARM else instance.encoder
        assert folder is not None
        encoder.load_state_dict(load_encoder(folder, size).state_dict())
    if stage.batch_norm == "fold":
        fold_encoder(encoder)
    torch.manual_seed(instance.seed + 1)  # not where the encoder's weights ended: lsuv has drawn more
    drawn = {"init": arm} if arm in DRAWN_ARMS else {}
    task = TASKS[stage.task.name](encoder, len(context.store.classes), **constructor_arguments(stage.task) | drawn)
    if arm == "pretrained_decoder":
        task.start_from({"decoder": load_decoder(instance.companions["decoder"])})
    if stage.rescale != "none":
        ids = finetune_ids(context, stage, instance)[: count_response_images(size)]
        kept = stage.rescale == "new_layers" and is_loaded
        rescale_task(task, load_eval_batch(context, stage, ids, torch.device("cpu")), new_layers_only=kept)
    return task


def _first_images(context: StageContext, stage: Finetune, instance: StageInstance) -> Tensor:
    """Returns (n, 3, S, S) training images with the evaluation augmentation, the same on every worker."""
    return load_eval_batch(context, stage, finetune_ids(context, stage, instance)[:NUM_LSUV_IMAGES]).views[0].cpu()
