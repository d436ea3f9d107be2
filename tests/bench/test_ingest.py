"""The parts of the ingest measurement that need neither Ray nor a store."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench import ingest
from firstlight.pipeline.data.images import decode_rgb


def test_written_images_are_different_jpegs(tmp_path: Path) -> None:
    folder = ingest.write_images(tmp_path / "images", 6)
    table = pq.read_table(folder / "train-000000.parquet")
    images = [decode_rgb(data) for data in table["image"].to_pylist()]
    assert len(images) == 6
    assert {image.shape for image in images} == {(ingest.INGEST_IMAGE_SIZE, ingest.INGEST_IMAGE_SIZE, 3)}
    assert not np.array_equal(images[0], images[1])


def test_pillow_batches_repeat_the_images(tmp_path: Path) -> None:
    folder = ingest.write_images(tmp_path / "images", 2)
    dataset = ingest.PillowDataset(pq.read_table(folder / "train-000000.parquet")["image"].to_pylist())
    assert len(dataset) == ingest.ALL_READ_BATCHES * ingest.INGEST_BATCH
    batch = next(ingest.iterate_pillow_batches(dataset))
    assert tuple(batch.shape) == (ingest.INGEST_BATCH, ingest.INGEST_IMAGE_SIZE, ingest.INGEST_IMAGE_SIZE, 3)


def test_cpu_seconds_include_this_process() -> None:
    before = ingest.read_cpu_seconds()[os.getpid()]
    sum(range(3_000_000))
    assert ingest.read_cpu_seconds()[os.getpid()] > before


def test_recipe_has_stream_and_workers(tmp_path: Path) -> None:
    recipe = ingest.make_ingest_recipe(tmp_path, tmp_path / "storage", 1, "off")
    assert (recipe.scale.workers, recipe.stream.resident) == (1, "off")
    assert recipe.stages["pretrain"].batch_size == ingest.INGEST_BATCH
