"""The stage `reconstruct`: its ratio and figures, on the images and with the corruption that it names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search.objectives import check_measure, read_scores
from firstlight.pipeline.stages.artifacts.companions import load_decoder
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.pictures import PICTURES_FILE, load_pictures
from firstlight.pipeline.stages.reconstruct import ReconstructStage, check_decoder_mirrors
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.run_file import read_run_id
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.corruption import Corruption
from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.reconstruction import measure_psnr, reconstruct_images
from tests.support import recipes
from tests.support.gloo import Pool

pytestmark = pytest.mark.usefixtures("undrawn_figures")
QUIET = Console(quiet=True)
DAE: dict[str, Any] = {
    "kind": "pretrain",
    "method": {"name": "dae", "corruption": "big_block", "norm": "group"},
    "epochs": 1,
    "batch_size": 32,
    "optimizer": {"name": "Adam", "lr": 0.003},
}
NOISE: dict[str, Any] = {"kind": "reconstruct", "sigma": [25.0, 25.0], "batch_size": 16}


def denoising(storage: Path, *, stages: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    both = {"tested": NOISE, "held_out": {**NOISE, "images": "val"}} if stages is None else stages
    return recipes.recipe(storage, stages={"pretrain": DAE, **both}, encoder__norm="group", **changes)


def folder_of(storage: Path, stage: str) -> Path:
    (folder,) = (storage / "small").glob(f"{stage}-seed0-*")
    return folder


@pytest.fixture(scope="module")
def denoised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the storage of a recipe with a reconstruction of test and one of held-out images, run."""
    storage = tmp_path_factory.mktemp("denoised")
    rows = run_recipe(denoising(storage), QUIET).rows
    assert [(row.stage, row.measure) for row in rows] == [
        ("tested", "PSNR (dB), test images, pretrained"),
        ("held_out", "PSNR (dB), held-out images, pretrained"),
    ]
    return storage


@pytest.mark.parametrize(("stage", "split"), [("tested", "test"), ("held_out", "val")])
def test_ratio_is_the_mean_over_the_split_with_the_corruption_of_the_stage(
    denoised: Path, stage: str, split: str
) -> None:
    """The encoder was trained on blocks; the images have noise."""
    recipe = denoising(denoised)
    context = StageContext.create(recipe, recipes.store(denoised), on_ray=False)
    trained = folder_of(denoised, "pretrain")
    encoder, decoder = load_encoder(trained / "encoder", 8).eval(), load_decoder(trained / "decoder").eval()
    ids = getattr(context.splits, split)
    (batch,) = context.iterate_batches(ids, len(ids))
    noise = Corruption("pixel_gaussian", (25.0, 25.0), 4, 21, 0)
    with torch.no_grad():
        corrupted = noise.apply_to(batch.views[0], batch.ids, batch.passes, encoder.input.mean)
        ratios = measure_psnr(encoder.input, reconstruct_images(encoder, decoder, corrupted), batch.views[0])
    result = json.loads((folder_of(denoised, stage) / "result.json").read_text())
    assert result["images"] == len(ids)
    assert result["psnr"] == {split: pytest.approx(float(ratios.double().mean()), rel=1e-5)}
    assert 5 < result["psnr"][split] < 60


@pytest.mark.parametrize(
    ("stage", "split", "shown"), [("tested", "test", "test images"), ("held_out", "val", "held-out images")]
)
def test_figures_show_images_of_the_split(denoised: Path, stage: str, split: str, shown: str) -> None:
    grids = {grid.name: grid for grid in load_pictures(folder_of(denoised, stage) / PICTURES_FILE)}
    assert set(grids) == {"reconstructions", "feature_maps"}
    assert grids["reconstructions"].title == f"{shown}, corrupted and reconstructed"
    context = StageContext.create(denoising(denoised), recipes.store(denoised), on_ray=False)
    (batch,) = context.iterate_batches(getattr(context.splits, split), 500)
    known = {image.mean(0).mul(255).round().int().numpy().tobytes() for image in batch.views[0]}
    clean = grids["reconstructions"].rows[0].images
    assert len(clean) == 8
    assert all(image.mean(0).mul(255).round().int().numpy().tobytes() in known for image in clean)


def test_search_compares_trials_by_the_ratio_on_held_out_images(denoised: Path) -> None:
    recipe = denoising(denoised)
    check_measure("held_out.psnr", "objectives.0.measure", recipe)
    instance = StageInstance("held_out", 0, "f", folder_of(denoised, "held_out"))
    (score,) = read_scores("held_out.psnr", recipe, [instance])
    assert score == json.loads(instance.result_file.read_text())["psnr"]["val"]
    with pytest.raises(UserError, match=r"stages\.tested\.images: 'test' reads test images, and score_test is false"):
        denoising(denoised, score_test=False)


def test_encoder_of_mlflow_is_reconstructed_with_its_decoder(denoised: Path) -> None:
    reference = f"runs:/{read_run_id(folder_of(denoised, 'pretrain'))}/encoder"
    stage = {"again": {**NOISE, "encoder": reference}}
    raw = recipes.recipe(denoised, name="later", stages=stage, encoder__norm="group")
    (row,) = run_recipe(raw, QUIET).rows
    before = json.loads((folder_of(denoised, "tested") / "result.json").read_text())["psnr"]["test"]
    assert row.pretrained == (pytest.approx(before, rel=1e-6),)


def test_encoder_without_a_decoder_is_refused(tmp_path: Path) -> None:
    nat = recipes.RECIPE["stages"]["pretrain"]
    recipe = recipes.recipe(tmp_path, stages={"pretrain": nat, "again": NOISE})
    with pytest.raises(
        UserError, match=r"^stages\.again\.encoder: nat of stages\.pretrain makes no decoder; valid: an"
    ):
        run_recipe(recipe, QUIET)
    run_recipe(recipes.recipe(tmp_path, stages={"pretrain": nat}), QUIET)
    reference = f"runs:/{read_run_id(folder_of(tmp_path, 'pretrain'))}/encoder"
    later = recipes.recipe(tmp_path, name="later", stages={"again": {**NOISE, "encoder": reference}})
    with pytest.raises(UserError, match=r"^stages\.again\.encoder: "):
        run_recipe(later, QUIET)


def test_decoder_of_another_encoder_is_refused(tmp_path: Path) -> None:
    recipe = denoising(tmp_path)
    other = Decoder([[4, 8, 8], [8, 4, 4], [16, 2, 2]], 1, 8)
    with pytest.raises(
        UserError, match=r"^stages\.x\.encoder: its decoder does not mirror the recipe's encoder: shapes"
    ):
        check_decoder_mirrors(other, recipe, "stages.x")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("shown_map", 9, "stages.tested.shown_map: 9 is none of the encoder's 2 feature maps; valid: 1 to 2"),
        ("sigma", [50.0, 10.0], "stages.tested.sigma: [50.0, 10.0] is not valid: the lower bound comes first"),
        ("corruption", "blur", "stages.tested.corruption: "),
    ],
)
def test_impossible_setting_is_refused_by_its_key(tmp_path: Path, key: str, value: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        run_recipe(denoising(tmp_path, stages={"tested": {**NOISE, key: value}}), QUIET)
    assert str(error.value).startswith(told)


@pytest.mark.parametrize("pictures", ["val", "test"])
def test_pretraining_draws_the_images_of_the_split_that_it_names(tmp_path: Path, pictures: str) -> None:
    recipe = denoising(tmp_path, stages={"pretrain": {**DAE, "pictures": pictures}})
    run_recipe(recipe, QUIET)
    grid = load_pictures(folder_of(tmp_path, "pretrain") / PICTURES_FILE)[0]
    assert grid.title == f"{'test' if pictures == 'test' else 'held-out'} images, corrupted and reconstructed"
    context = StageContext.create(recipe, recipes.store(tmp_path), on_ray=False)
    (batch,) = context.iterate_batches(getattr(context.splits, pictures), 500)
    known = {image.mean(0).mul(255).round().int().numpy().tobytes() for image in batch.views[0]}
    found = {image.mean(0).mul(255).round().int().numpy().tobytes() for image in grid.rows[0].images}
    assert len(found) == 8
    assert found <= known


def test_pictures_of_test_images_need_a_test_split(tmp_path: Path) -> None:
    recipe = denoising(
        tmp_path,
        stages={"pretrain": {**DAE, "pictures": "test"}},
        dataset__test_fraction=0.0,
    )
    with pytest.raises(UserError, match=r"^stages\.pretrain\.pictures: needs a test split"):
        run_recipe(recipe, QUIET)
    with pytest.raises(
        UserError, match=r"stages\.pretrain\.pictures: 'test' reads test images, and score_test is false"
    ):
        denoising(tmp_path, stages={"pretrain": {**DAE, "pictures": "test"}}, score_test=False)


def reconstruct_on_this_rank(storage: str, trained: str, folder: str) -> None:
    recipe = denoising(Path(storage))
    context = StageContext.create(recipe, recipes.store(Path(storage)), on_ray=False)
    companions = {"decoder": Path(trained) / "decoder"}
    instance = StageInstance("tested", 0, "f", Path(folder), Path(trained) / "encoder", companions)
    stage: Any = recipe.stages["tested"]
    ReconstructStage().run(context, stage, instance)


def test_two_workers_have_the_ratio_and_pictures_of_one(denoised: Path, pool: Pool, tmp_path: Path) -> None:
    pool.run(reconstruct_on_this_rank, str(denoised), str(folder_of(denoised, "pretrain")), str(tmp_path))
    alone = folder_of(denoised, "tested")
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (alone, tmp_path))
    assert two["psnr"]["test"] == pytest.approx(one["psnr"]["test"], rel=1e-6)
    assert two["images"] == one["images"]
    for grid, other in zip(load_pictures(alone / PICTURES_FILE), load_pictures(tmp_path / PICTURES_FILE), strict=True):
        assert grid.title == other.title
        assert torch.equal(grid.rows[1].images, other.rows[1].images)
