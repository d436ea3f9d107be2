"""The weights that a fine-tuning starts from: batch normalisations folded away, and layers rescaled by images.

NAT does both before VOC (section 4.2, after Kraehenbuehl et al. 2016).
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.downstream.task import Task
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.batch_norm_folding import fold_batch_norms
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.rescaling import balance_change_rates, find_hidden_layers, normalize_responses

# Images that the layers are balanced by; a batch of the authors' code (magic_init.py, -bs). It takes gradients.
NUM_BALANCE_IMAGES = 16
# Images that responses are normalised by: at most as many, and at most so many pixels.
MAX_RESPONSE_IMAGES, MAX_RESPONSE_PIXELS = 64, 64 * 224**2
# The seed of what a task draws as it computes the images: the proposals that a detector looks at.
RUN_SEED = 0
NORM_TYPES = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def fold_encoder(encoder: Encoder) -> None:
    """Folds the batch normalisations of an encoder into its convolutions.

    Raises:
        ValueError: it has none, or one that follows no convolution.
    """
    rng = torch.Generator().manual_seed(0)
    fold_batch_norms(encoder, torch.rand(2, 3, encoder.image_size, encoder.image_size, generator=rng))


def count_response_images(image_size: int) -> int:
    """Returns the number of images that responses are normalised by: fewer where images are large."""
    return max(1, min(MAX_RESPONSE_IMAGES, MAX_RESPONSE_PIXELS // image_size**2))


def check_rescaling(task: Task) -> None:
    """Checks that scaling the layers of a task changes how it trains.

    Raises:
        ValueError: it cannot be rescaled; the message says why.
    """
    if not task.output_layers():
        raise ValueError("a task of this kind is never rescaled")
    norms = [module for module in task.modules() if isinstance(module, NORM_TYPES)]
    if norms:
        raise ValueError(
            f"{len(norms)} normalisations undo every scale; set batch_norm: fold, and task.norm: none if the head has "
            "hidden layers"
        )


def rescale_task(task: Task, batch: Batch, *, new_layers_only: bool) -> None:
    """Rescales the layers of a task by a batch of training images, so that all change at about the same rate.

    Responses are normalised (algorithm 1), then layers balanced (algorithm 2). The layers that give the predictions are
    left as the task drew them: voc-classification (train_cls.py) draws them after everything else.

    Args:
        task: is left in training mode.
        batch: `count_response_images` images, with their targets.
        new_layers_only: True to normalise the responses of the task's own layers only, as the authors' code does with a
            pretrained network (magic_init.py, -l): its encoder keeps computing what it did.

    Raises:
        ValueError: as `check_rescaling`.
    """
    check_rescaling(task)
    task.train()
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    few = batch.select_range(0, NUM_BALANCE_IMAGES)
    outputs = task.output_layers()
    layers = find_hidden_layers(lambda: _run_task(task, few), task, outputs)
    of_encoder = set(task.encoder.modules()) if new_layers_only else set[nn.Module]()
    normalize_responses(lambda: _run_task(task, batch), [layer for layer in layers if layer not in of_encoder])
    balance_change_rates(lambda: _run_task(task, few), task, outputs)
    task.train()


def _run_task(task: Task, batch: Batch) -> None:
    """Computes a batch, with the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RUN_SEED)
        task.probe_outputs(batch)
