"""Predictions of a fine-tuned model: for images in memory and files, in this process, or for many on Ray Data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.data.ray_data import ActorPool, NetworkFunction
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.features.inference import predict_batches
from firstlight.pipeline.stages.prediction.answers import ImageAnswer, build_answer
from firstlight.pipeline.stages.prediction.image_items import GivenImages, ImageItems, ImageLike
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing, SavedModel, read_model
from firstlight.pipeline.stages.prediction.view_batches import (
    REFUSED_KEY,
    ViewBatches,
    pack_arrays,
    unpack_arrays,
    unpack_refused,
)
from firstlight.pipeline.train.accelerator.cpu import set_up_cpu
from firstlight.pipeline.usable_cpus import count_decoders, count_decoders_beside, count_usable_cpus
from firstlight.tasks.device.pixel_levels import scale_pixels, send_pixels
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.downstream.whole_images import ImageViews

# Batches that are decoded ahead of the network.
PREFETCHED_BATCHES = 2
DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True)
class ItemAnswer:
    """The outcome for one item: an answer, or the reason why the image cannot be used."""

    position: int
    # Width and height of the image; None if it cannot be used.
    size: tuple[int, int] | None
    answer: ImageAnswer | None
    reason: str | None = None


class FineTunedModel:
    """A fine-tuned model that predicts: `firstlight.load_model` returns one.

    `classes`: the names of its classes, in the order of its outputs. `task`: the name of its task. `network`: the
    task as a module of torch, in evaluation mode. `preprocessing`: how it sees an image.
    """

    def __init__(self, saved: SavedModel) -> None:
        self.saved, self.network = saved, saved.task
        self.task: str = saved.spec["name"]
        self.classes: tuple[str, ...] = saved.classes
        self.preprocessing: Preprocessing = saved.preprocessing

    def predict(self, images: Iterable[ImageLike], batch_size: int = DEFAULT_BATCH_SIZE) -> list[ImageAnswer]:
        """Returns the answer for each image.

        It is an `ImageClasses`, an `ImageMask` or an `ImageObjects`, as the task says; masks and boxes are in pixels of
        the image, at its own size.

        Args:
            images: paths, PIL images, arrays (H, W, 3) or (H, W) uint8, or tensors (C, H, W), C 1 or 3, uint8 or floats
                in 0..1, which are rounded to 8 bits. All can be mixed, and be of any size. A model of images with their
                channels as they are takes paths, and arrays (H, W, C) of its channels and bits.
            batch_size: the number of images that the network gets at a time.

        Raises:
            UserError: one of `images` cannot be used; names it.
        """
        items = GivenImages(list(images))
        found = []
        for item in predict_items(items, self.saved, batch_size=batch_size):
            if item.answer is None:
                raise UserError(f"{items.name_images([item.position])[0]}: cannot be used: {item.reason}")
            found.append(item.answer)
        return found


def predict_items(
    items: ImageItems,
    model: SavedModel,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    folder: Path | None = None,
    pool: ActorPool | None = None,
    threads: int = 1,
) -> Iterator[ItemAnswer]:
    """Yields what comes out for each item, in order.

    Args:
        items: the images.
        model: is used in this process, on the device where it is.
        batch_size: the number of images that the network gets at a time. It can change the last bits of the answers.
        folder: the folder of `model`, which actors read.
        pool: the actors of Ray; None to predict in this process.
        threads: the torch threads of an actor.

    Raises:
        UserError: a store is damaged.
    """
    batches = ViewBatches(items, model.preprocessing, batch_size)
    if pool is None:
        build: Callable[[], NetworkFunction] = partial(_use_network, model.task)
    else:
        assert folder is not None, "actors read the model from its folder"
        build = partial(build_packed_network, folder, threads, pool.gpus > 0)
    # A GPU waits for images; a network on CPUs needs most of these itself.
    on_gpu = next(model.task.parameters()).device.type == "cuda"
    decoding = count_decoders(count_usable_cpus()) if on_gpu else count_decoders_beside(torch.get_num_threads())
    for packed in predict_batches(batches, build, pool, PREFETCHED_BATCHES, decoding):
        yield from _unpack_answers(packed, model)


def build_packed_network(folder: Path, threads: int, gpu: bool) -> NetworkFunction:
    """Reads a model in the process that calls this, and returns the function from packed views to packed answers."""
    set_up_cpu(threads)
    return _use_network(read_model(folder).task.to("cuda" if gpu else "cpu"))


def _use_network(task: Task) -> NetworkFunction:
    # The memory format that most convolutions are fastest in, on a CPU too.
    return partial(_answer_packed, task.eval().to(memory_format=torch.channels_last))  # type: ignore[call-overload]


@torch.inference_mode()
def _answer_packed(task: Task, packed: np.ndarray) -> np.ndarray:
    """Returns the packed answers for packed views: `<prediction>/<k>` of the k-th image that can be used."""
    arrays = unpack_arrays(packed)
    images = _list_views(arrays, next(task.parameters()).device)
    found = {name: arrays[name] for name in ("position", "size")}
    for k, values in enumerate(task.predict_images(images) if images else ()):
        found |= {f"{name}/{k}": tensor.cpu().numpy() for name, tensor in values.items()}
    return pack_arrays({**found, REFUSED_KEY: arrays[REFUSED_KEY]})


def _list_views(arrays: Mapping[str, np.ndarray], device: torch.device) -> list[ImageViews]:
    """Returns the images of an unpacked batch, their pixels in 0..1 as a training has them."""
    views = scale_pixels(send_pixels(arrays["pixels"], device))
    regions = torch.from_numpy(np.require(arrays["region"], requirements="W")).to(device)
    maps = torch.from_numpy(np.require(arrays["to_view"], requirements="W")).to(device)
    counts = arrays["count"].tolist()
    parts: Iterator[tuple[Tensor, Tensor, Tensor, Any]] = zip(
        views.split(counts), regions.split(counts), maps.split(counts), arrays["size"].tolist(), strict=True
    )
    return [ImageViews(own, region, to_view, (width, height)) for own, region, to_view, (width, height) in parts]


def _unpack_answers(packed: np.ndarray, model: SavedModel) -> list[ItemAnswer]:
    """Returns the answers of a batch and the images that cannot be used, by position."""
    arrays = unpack_arrays(packed)
    values: dict[int, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        prediction, slash, number = name.partition("/")
        if slash:
            values.setdefault(int(number), {})[prediction] = array
    found = [ItemAnswer(position, None, None, reason) for position, reason in unpack_refused(arrays[REFUSED_KEY])]
    for k, (position, size) in enumerate(zip(arrays["position"].tolist(), arrays["size"].tolist(), strict=True)):
        answer = build_answer(model.target, model.classes, values[k])
        found.append(ItemAnswer(position, (size[0], size[1]), answer))
    return sorted(found, key=lambda item: item.position)
