"""The stage `reconstruct`: held-out or test images that are corrupted, and reconstructed by a pretrained encoder with
its decoder.

The images need not be those of the pretraining, nor the corruption that of the pretraining: one corruption for all
makes reconstructions comparable.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.measures import SHOWN_IMAGES, Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import Splits, select_evenly_spaced
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.records import Count, RecordShape
from firstlight.pipeline.stages.artifacts.companions import load_decoder
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.checks import check_test_split, name_encoder_maker
from firstlight.pipeline.stages.pictures import NUM_VIEWED_IMAGES, PICTURES_FILE, save_pictures
from firstlight.pipeline.stages.sections.reconstruct import Reconstruct
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind, StreamedBatch
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.corruption import Corruption
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.reconstruction import check_shown_map, draw_reconstructions, measure_psnr, reconstruct_images


def reconstructed_ids(stage: Reconstruct, splits: Splits) -> np.ndarray:
    return splits.val if stage.images == "val" else splits.test


def _build_corruption(stage: Reconstruct, seed: int) -> Corruption:
    return Corruption(stage.corruption, stage.sigma, stage.patch, stage.blocks, seed)


def _corrupt_batch(stage: Reconstruct, encoder: Encoder, batch: Batch, seed: int) -> Tensor:
    return _build_corruption(stage, seed).apply_to(batch.views[0], batch.ids, batch.passes, encoder.input.mean)


class _ReconstructionShape(RecordShape):
    """The result of a reconstruction: the number of images, and their mean ratio by split."""

    images: Count
    psnr: dict[str, float]


RECONSTRUCTION_SHAPE = TypeAdapter(_ReconstructionShape)


class ReconstructStage(StageKind[Reconstruct]):
    """Reconstructions of corrupted images, and how close they are."""

    section = Reconstruct

    @torch.no_grad()
    def run(self, context: StageContext, stage: Reconstruct, instance: StageInstance) -> None:
        """Writes pictures and `result.json` into the instance's folder. It is called on every worker."""
        assert instance.encoder is not None
        encoder = load_encoder(instance.encoder, context.recipe.dataset.image_size).to(context.device).eval()
        decoder = load_decoder(instance.companions["decoder"]).to(context.device).eval()
        ids = reconstructed_ids(stage, context.splits)
        ratios = []
        for batch in context.iterate_batches(ids, stage.batch_size):
            corrupted = _corrupt_batch(stage, encoder, batch, instance.seed)
            found = measure_psnr(encoder.input, reconstruct_images(encoder, decoder, corrupted), batch.views[0])
            ratios.append(found.double())
        mean = float(gather_rows(ratios, len(ids)).mean())
        if rank() == 0:
            loader = context.build_loader([context.recipe.dataset.eval_augment], instance.seed)
            batch = to_batch(loader.load_once(select_evenly_spaced(ids, NUM_VIEWED_IMAGES)), context.device)
            corrupted = _corrupt_batch(stage, encoder, batch, instance.seed)
            subject = SHOWN_IMAGES[stage.images]
            grids = draw_reconstructions(encoder, decoder, batch.views[0], corrupted, subject, stage.shown_map)
            save_pictures(grids, instance.folder / PICTURES_FILE)
            instance.write_result({"images": len(ids), "psnr": {stage.images: mean}})
        barrier()

    def result_shape(self, stage: Reconstruct) -> TypeAdapter[Any]:
        return RECONSTRUCTION_SHAPE

    def check_encoder(self, name: str, stage: Reconstruct, recipe: Recipe, encoder: Encoder) -> None:
        try:
            check_shown_map(encoder, stage.shown_map)
        except ValueError as error:
            raise UserError(f"stages.{name}.{error}") from None

    def check_source(self, name: str, stage: Reconstruct, context: RecipeContext) -> None:
        if stage.images == "test":
            check_test_split(f"stages.{name}", context)
        source = context.recipe.encoder_source(name)
        if source is not None and source.stage is not None and "decoder" not in context.networks.get(source.stage, {}):
            method = name_encoder_maker(context.recipe, source.stage)
            raise UserError(
                f"stages.{name}.encoder: {method} of stages.{source.stage} makes no decoder; valid: an encoder whose "
                "method makes one"
            )

    def check_companions(self, name: str, stage: Reconstruct, recipe: Recipe, companions: Mapping[str, Path]) -> None:
        check_decoder_mirrors(load_decoder(companions["decoder"]), recipe, f"stages.{name}")

    def check_images(self, name: str, stage: Reconstruct, recipe: Recipe, splits: Splits) -> None:
        count, workers = len(reconstructed_ids(stage, splits)), max(recipe.scale.max_workers, 1)
        if count < workers:
            raise UserError(f"stages.{name}.images: {stage.images!r} has {count} images for {workers} workers: too few")

    def read_score(
        self, stage: Reconstruct, measure: Measure, arm: str, split: str, instance: StageInstance
    ) -> float | None:
        """Returns the ratio of the stage's images, whichever split they are from."""
        result = instance.result or {}
        return float(result["psnr"][stage.images])

    def describe(self, stage: Reconstruct, results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        details = {
            "pixel_gaussian": f"sigma {stage.sigma[0]:g} to {stage.sigma[1]:g}",
            "patch_gaussian": f"sigma {stage.sigma[0]:g} to {stage.sigma[1]:g}, squares of {stage.patch} pixels",
            "big_block": "one square",
            "small_blocks": f"{stage.blocks} squares",
        }
        yield "corruption", f"{stage.corruption.replace('_', ' ')}, {details[stage.corruption]}"

    def streamed_batches(self, stage: Reconstruct, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        return [(stage.batch_size, [dataset.image_size])]


def check_decoder_mirrors(decoder: Decoder, recipe: Recipe, where: str) -> None:
    """Checks that a saved decoder mirrors the recipe's encoder.

    Raises:
        UserError: names the first property that differs.
    """
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    wanted = {
        "shapes": [list(shape) for shape in encoder.shapes],
        "channels": encoder.input.channels,
        "image_size": encoder.image_size,
    }
    for key, value in wanted.items():
        if decoder.spec[key] != value:
            raise UserError(
                f"{where}.encoder: its decoder does not mirror the recipe's encoder: {key} {decoder.spec[key]}; "
                f"valid: {value}"
            )
