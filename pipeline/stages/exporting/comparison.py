"""The comparison of an exported network with the original: the images, and the differences of the outputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.nn.export_formats import measure_difference

# (B, C, S, S) in 0..1 -> the outputs: (B, C) features and (B, C, h, w) last map of an encoder, logits of a model
NetworkAnswer = Callable[[Tensor], tuple[Tensor, ...]]
# The number of images of the store that are compared, and those of the random batches.
NUM_REAL_IMAGES, RANDOM_BATCH_SIZES = 8, (1, 5)


@torch.no_grad()
def compare_answers(
    own_answer: NetworkAnswer, answer: NetworkAnswer, tests: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Returns the largest absolute and relative differences of the outputs of two networks, by set of images."""
    out = {}
    for name, images in tests.items():
        outputs = zip(own_answer(images), answer(images), strict=True)
        pairs = [measure_difference(own, other) for own, other in outputs]
        out[name] = {"images": len(images), "absolute": max(a for a, _ in pairs), "relative": max(r for _, r in pairs)}
    return out


def choose_comparison_images(context: StageContext) -> dict[str, Tensor]:
    """Returns (B, C, S, S) images in 0..1: of the store, held-out ones where there are any, then test ones, then
    training ones; and random batches of two sizes.
    """
    ids = next(ids for ids in (context.splits.val, context.splits.test, context.splits.train) if len(ids))[
        :NUM_REAL_IMAGES
    ]
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0)
    real = to_batch(loader.load_once(ids), torch.device("cpu")).views[0]
    generator, size = torch.Generator().manual_seed(0), real.shape[-1]
    return {
        "store": real,
        **{f"random {n}": torch.rand(n, real.shape[1], size, size, generator=generator) for n in RANDOM_BATCH_SIZES},
    }
