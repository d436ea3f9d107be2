"""Colours that are null in a recipe are those of its training images, or of the encoder that it starts from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run.input_colours import fill_input_colours, measure_colours
from tests.support import recipes


def test_colours_are_those_of_the_training_images(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path, encoder__mean=None, encoder__std=None)
    filled = fill_input_colours(recipe, digits, [])
    pixels = np.stack([decode_rgb(data) for data in digits.read(digits.ids("train"))[0]]) / 255
    assert filled.encoder.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-4)
    assert filled.encoder.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-4)
    assert filled.stages == recipe.stages


def test_store_without_colours_is_looked_at(digits: Store) -> None:
    images = {key: value for key, value in digits.images.items() if key != "colours"}
    found = measure_colours(replace(digits, images=images), 10_000)
    assert found.mean == pytest.approx(measure_colours(digits, 10_000).mean, abs=0.02)


def test_saved_encoder_comes_first_and_given_numbers_stay(tmp_path: Path, digits: Store) -> None:
    spec = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    recipe = recipes.recipe(tmp_path, encoder__mean=None, encoder__std=[0.7, 0.7, 0.7])
    filled = fill_input_colours(recipe, digits, [spec])
    assert (filled.encoder.mean, filled.encoder.std) == ((0.1, 0.2, 0.3), (0.7, 0.7, 0.7))
    plain = recipes.recipe(tmp_path)
    assert fill_input_colours(plain, digits, []) is plain
    by_image = recipes.recipe(tmp_path, encoder__mean=None, encoder__normalize="image")
    assert fill_input_colours(by_image, digits, []) is by_image
