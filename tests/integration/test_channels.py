"""Images with their channels as they are, from files to batches, trainings, scores, exports and predictions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from firstlight.pipeline.api import load_encoder
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.image_statistics import describe_statistics
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.manifest import QUARANTINE_FILE
from firstlight.pipeline.data.parquet import read_parquet_table
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import EvalOrder, LoadingOptions, stream_batches
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.input_colours import fill_input_colours, measure_colours
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.prediction.predictor import FineTunedModel
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.pretraining.views import list_dropped_ops, list_views
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.training_job import to_batch
from tests.support.blank_figures import save_blank
from tests.support.channel_images import (
    band_recipe,
    draw_bands,
    encode_bands,
    encode_pages,
    prepare_bands,
    write_band_folders,
)
from tests.support.dicom_files import encode_dicom, read_packaged_dicom
from tests.support.local_training import Stopped, fit_until

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
AUGMENT = (
    {"op": "random_resized_crop", "scale": (0.5, 1.0), "ratio": (0.75, 4 / 3)},
    {"op": "horizontal_flip", "p": 0.5},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of classes of 13 bands of 16 bits, with three files of other kinds."""
    root = write_band_folders(tmp_path_factory.mktemp("bands"))
    Image.new("RGB", (32, 32)).save(root / "field" / "photo.png")
    (root / "field" / "twelve.tif").write_bytes(encode_bands(draw_bands(0, 12)))
    (root / "water" / "byte.tif").write_bytes(encode_bands(draw_bands(0, 13, bits=8)))
    return root


@pytest.fixture(scope="module")
def bands(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    storage = tmp_path_factory.mktemp("storage")
    return prepare_bands(band_recipe(storage, folder), storage)


def filled(recipe: Recipe, store: Store) -> Recipe:
    return fill_input_colours(recipe, store, [])


def test_the_census_has_every_channel_and_names_what_it_refuses(bands: Store, folder: Path) -> None:
    assert bands.pixels == bands.stated_pixels == PixelFormat(13, 16)
    rows = read_parquet_table(bands.path / QUARANTINE_FILE).to_pylist()
    assert {Path(row["path"]).name: row["reason"] for row in rows} == {
        "photo.png": "has 3 channels of 8 bits; valid: 13 channels of 16 bits",
        "twelve.tif": "has 12 channels of 16 bits; valid: 13 channels of 16 bits",
        "byte.tif": "has 8 bits a channel, unsigned integers; valid: 13 channels of 16 bits, unsigned integers",
    }
    lines = describe_statistics(bands.images, bands.splits)
    assert "mode 13 channels of 16 bits" in lines[1]
    assert any(line.startswith("13 channels of 16 bits, as they are in the files") for line in lines)
    assert sum(line.startswith("channel ") for line in lines) == 13
    images, _ = bands.read(bands.ids("train"))
    values = np.stack([bands.open_image(data, 10_000).values for data in images]) / 65535  # type: ignore[union-attr]
    found = measure_colours(bands, 10_000)
    assert np.allclose(found.mean, values.mean((0, 1, 2)), atol=1e-7)
    assert np.allclose(found.std, values.std((0, 1, 2)), atol=1e-6)


def test_the_network_gets_the_values_of_the_file(bands: Store, folder: Path, tmp_path: Path) -> None:
    context = StageContext.create(band_recipe(tmp_path, folder, dataset__image_size=32), bands, on_ray=False)
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0)
    ids = bands.ids("train")[:6]
    views = to_batch(loader.load_once(ids), CPU).views[0]
    paths = bands.read_paths(ids)
    for view, path in zip(views, paths, strict=True):
        folder_name, name = Path(str(path)).parts[-2:]
        kind = ("field", "water").index(folder_name)
        expected = draw_bands(1000 * kind + int(Path(name).stem), kind=kind)
        assert np.array_equal((view.double() * 65535).round().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_have_the_same_pixels_on_any_number_of_workers(bands: Store, world: int) -> None:
    loader = Loader(bands, (AUGMENT, AUGMENT), 16, 3, 10_000)
    ids, options = bands.ids("train"), LoadingOptions(on_ray=False, prefetch=2, tasks=1, task_cpus=1.0)
    whole = loader.load_once(ids)["views"]
    assert whole.dtype == np.uint16
    assert whole.shape == (len(ids), 2, 16, 16, 13)
    parts = [
        np.concatenate([arrays["views"] for arrays in stream_batches(loader, EvalOrder(ids, 5, r, world), 5, options)])
        for r in range(world)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_resident_streamed_and_augmented_on_the_device_are_one_training(
    bands: Store, folder: Path, tmp_path: Path
) -> None:
    ways = {"resident": {"stream__resident": "on"}, "streamed": {"stream__resident": "off"}}
    ways["device"] = {"stream__resident": "off", "stream__augment": "device"}
    found = {}
    for name, changes in ways.items():
        recipe = filled(band_recipe(tmp_path / name, folder, **changes), bands)
        found[name] = train_recipe(tmp_path / name, bands, recipe)
    assert found["resident"] == found["streamed"] == found["device"]


def train_recipe(folder: Path, store: Store, recipe: Recipe, stop: int | None = None) -> str:
    context = StageContext.create(recipe, store, on_ray=False)
    stage = context.recipe.stages["pretrain"]
    instance = StageInstance("pretrain", 3, "f", folder / "job")
    job = pretrain_job.build_job(context, stage, instance)  # type: ignore[arg-type]
    return fit_until(stop, job, pretrain_job.build_seeded_method(context, stage, job))[0]  # type: ignore[arg-type]


def test_a_resumed_training_has_the_same_bits(bands: Store, folder: Path, tmp_path: Path) -> None:
    recipe = filled(band_recipe(tmp_path, folder), bands)
    whole = train_recipe(tmp_path / "whole", bands, recipe)
    with pytest.raises(Stopped):
        train_recipe(tmp_path / "stopped", bands, recipe, stop=4)
    assert train_recipe(tmp_path / "stopped", bands, recipe) == whole


def test_pages_of_a_grey_stack_are_channels(tmp_path: Path) -> None:
    stacks = {k: draw_bands(k, channels=5, side=16) for k in range(8)}
    (tmp_path / "in").mkdir()
    for k, values in stacks.items():
        (tmp_path / "in" / f"{k}.tif").write_bytes(encode_pages(values))
    (tmp_path / "in" / "single.tif").write_bytes(encode_bands(draw_bands(9, channels=1, side=16)))
    recipe = band_recipe(tmp_path, tmp_path / "in", dataset__channels=5, dataset__max_bad_fraction=0.5)
    store = prepare_bands(recipe, tmp_path)
    ids = store.ids("train")
    loaded = Loader(store, (({"op": "center_crop"},),), 16, 0, 10_000).load_once(ids)["views"][:, 0]
    for path, values in zip(store.read_paths(ids), loaded, strict=True):
        assert np.array_equal(values, stacks[int(Path(str(path)).stem)])
    (row,) = read_parquet_table(store.path / QUARANTINE_FILE).to_pylist()
    assert row["reason"] == "has 1 channel of 16 bits; valid: 5 channels of 16 bits"


def test_a_folder_of_scans_has_the_same_batches_as_tiff_files_of_their_levels(tmp_path: Path) -> None:
    loaded = {}
    for kind in ("dicom", "tiff"):
        for name in ("with", "without"):
            (tmp_path / kind / name).mkdir(parents=True)
        for k in range(12):
            levels = draw_bands(k, channels=1)
            # Scanners write files without an ending, too.
            where = tmp_path / kind / ("with" if k % 2 else "without") / (f"{k}.dcm" if k % 3 else f"{k}")
            units = (levels[:, :, 0].astype(np.int32) - 32_768).astype(np.int16)
            where.write_bytes(encode_dicom(units, Modality="CT") if kind == "dicom" else encode_bands(levels))
        (tmp_path / kind / "with" / "plan.dcm").write_bytes(read_packaged_dicom("rtplan.dcm"))
        recipe = band_recipe(
            tmp_path, tmp_path / kind, dataset__name=kind, dataset__channels=1, dataset__max_bad_fraction=0.5
        )
        store = prepare_bands(recipe, tmp_path)
        (row,) = read_parquet_table(store.path / QUARANTINE_FILE).to_pylist()
        assert row["reason"] == "is DICOM without pixels"
        loaded[kind] = Loader(store, (AUGMENT,), 16, 0, 10_000).load_once(store.ids("train"))["views"]
    assert loaded["dicom"].dtype == np.uint16
    assert np.array_equal(loaded["dicom"], loaded["tiff"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dataset__channels": None}, "dataset.bits: 16 needs dataset.channels; valid: null, or both"),
        ({"dataset__depth": 12}, "dataset.depth: 12 is not valid with dataset.channels, .* valid: null"),
        ({"dataset__store_size": 64}, "dataset.store_size: 64 is not valid with dataset.channels, .*valid: auto, off"),
        (
            {"dataset__train_augment": [{"op": "center_crop"}, {"op": "solarize"}]},
            "dataset.train_augment: solarize is not valid with dataset.channels, since .*; valid: leave it out",
        ),
        (
            {"stages__pretrain__augment": [{"op": "center_crop"}, {"op": "color_jitter"}]},
            "stages.pretrain.augment: color_jitter with saturation and hue is not valid .*",
        ),
        ({"encoder__channels": 3}, r"encoder.channels: 3 is not valid, as images have 13 \(dataset.channels\); .*"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}$"):
        band_recipe(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"encoder__input": "gray"}, "encoder.input: 'gray' needs images of 3 channels, these have 13; valid: rgb"),
        ({"encoder__mean": [0.5] * 3}, r"encoder.mean: \[0.5, 0.5, 0.5\] are 3 numbers, images have 13 channels"),
    ],
)
def test_a_network_of_other_channels_is_refused_before_ray(
    folder: Path, tmp_path: Path, changes: dict[str, object], line: str
) -> None:
    with pytest.raises(UserError, match=f"^{line}$"):
        run_recipe(band_recipe(tmp_path, folder, **changes), QUIET)


def test_a_method_leaves_out_what_mixes_colours_and_says_so(folder: Path, tmp_path: Path) -> None:
    recipe = band_recipe(tmp_path, folder, stages__pretrain__method={"name": "simclr"})
    stage = recipe.stages["pretrain"]
    dropped = list_dropped_ops(stage, recipe.dataset)  # type: ignore[arg-type]
    assert dropped == ["saturation of color_jitter", "hue of color_jitter", "random_grayscale"]
    (first, _) = list_views(stage, recipe.dataset)  # type: ignore[arg-type]
    names = [op.op for op in first.augment]
    assert "color_jitter" in names
    assert "random_grayscale" not in names


@save_blank()
def test_a_recipe_goes_from_files_to_exports_and_predictions(folder: Path, tmp_path: Path) -> None:
    """The stage `export` compares each format with the encoder or model, on images of the store and on noise."""
    encoder = {"name": "timm", "model": "test_resnet"}
    exports = {
        "export": {"kind": "export"},
        "model": {"kind": "export", "what": "model", "formats": ["safetensors", "onnx", "torch_export"]},
    }
    changes = {f"stages__{name}": stage for name, stage in exports.items()}
    task = {"name": "classify"}
    recipe = band_recipe(
        tmp_path, folder, encoder=encoder, stages__finetune__task=task, dataset__image_size=32,
        stages__pretrain__method={"name": "simclr"}, stages__finetune__epochs=4, stages__finetune__batch_size=8,
        **changes,
    )  # fmt: skip
    outcome = run_recipe(recipe, QUIET)
    scores = {(row.stage, row.measure): row.mean for row in outcome.rows}
    assert scores[next(key for key in scores if key[0] == "evaluate")] > 80
    found = {path.name for path in tmp_path.rglob("export-seed0-*/export/*") if path.is_dir()}
    assert {"timm", "safetensors", "onnx", "torch_export"} <= found
    (card,) = tmp_path.rglob("export-seed0-*/export/card.md")
    assert "13 channels of 16 bits" in card.read_text()
    (model,) = tmp_path.rglob("finetune-seed0-*/model")
    fine = FineTunedModel(read_model(model))
    assert fine.preprocessing.pixels == PixelFormat(13, 16)
    file = folder / "water" / "000.tif"
    (one, two) = fine.predict([file, draw_bands(1000, kind=1)])
    assert np.array_equal(one.probabilities, two.probabilities)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"photo.png: cannot be used: has 3 channels of 8 bits; valid: 13 channels"):
        fine.predict([folder / "field" / "photo.png"])
    with pytest.raises(UserError, match=r"an array \(32, 32, 3\) of uint8; valid: a path, or an array \(H, W, 13\)"):
        fine.predict([np.zeros((32, 32, 3), np.uint8)])
    embedder = load_encoder(next(tmp_path.rglob("pretrain-seed0-*/encoder")))
    vectors = embedder.embed([file, draw_bands(1000, kind=1)], bits=16)
    assert np.array_equal(vectors[0], vectors[1])
    assert np.abs(vectors[0] - embedder.embed([draw_bands(0)], bits=16)[0]).max() > 0
    with pytest.raises(UserError, match=r"^bits: None is not valid for a network of 13 channels; valid: 8 or 16$"):
        embedder.embed([file])
    with pytest.raises(UserError, match=r"000.tif: is not an image of 13 channels of 8 bits: has 16 bits"):
        embedder.embed([file], bits=8)
