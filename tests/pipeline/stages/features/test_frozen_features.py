"""Features of three arms: pretrained, given and random weights, through whole runs of the stages that compare them."""

import json
import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.run_scores import format_scores
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder, save_encoder
from firstlight.pipeline.stages.features.frozen_features import build_extractors, prepare_for_inference
from firstlight.pipeline.stages.pictures import read_tensors
from firstlight.pipeline.stages.shared_work import hash_weights
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from tests.support import recipes
from tests.support.recipe_runs import QUIET, runs_of

pytestmark = pytest.mark.usefixtures("undrawn_figures")
RETRIEVE = {"kind": "retrieve", "batch_size": 32, "precision_at": [1, 5]}
SECTIONS = {"encoder__mean": [0.1, 0.1, 0.1], "encoder__std": [0.3, 0.3, 0.3], "stages__retrieve": RETRIEVE}
ARMS = ("pretrained", "given", "random")


def draw_encoder(spec: dict[str, Any], seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(spec, 8).eval()


def comparing(storage: Path, **changes: Any) -> Recipe:
    """A recipe with all stages that compare weights, and weights to compare."""
    file = storage / "weights.safetensors"
    recipe = recipes.recipe(storage, encoder__weights=str(file), **SECTIONS, **changes)
    save_file(draw_encoder(recipe.network_spec, 7).state_dict(), file)
    return recipe


@torch.no_grad()
def test_inference_takes_channels_last_with_the_same_features_and_the_same_hash() -> None:
    spec = {"name": "convnet", "norm": "batch", "width": 4, "depth": 2}
    first, second = (FeatureExtractor(draw_encoder(spec, 3), None, (-1, 0), "avg").train() for _ in range(2))
    network = prepare_for_inference(second, torch.device("cpu"))
    assert not network.training
    convolutions = [module.weight for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert hash_weights(network) == hash_weights(first)
    images = torch.rand(5, 3, 8, 8)
    for found, expected in zip(network(images), first.eval()(images), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = comparing(tmp_path_factory.mktemp("compared"))
    rows = run_recipe(recipe, QUIET).rows
    assert len(rows) == 3 * 5
    assert len({row.measure for row in rows}) == len(rows)
    return recipe


def folder_of(recipe: Recipe, stage: str) -> Path:
    (folder,) = (recipe.storage / recipe.name).glob(f"{stage}-seed0-*")
    return folder


def result_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    result = json.loads((folder_of(recipe, stage) / "result.json").read_text())
    return {key: value for key, value in result.items() if key != "sum"}


def test_each_arm_has_its_own_weights(tmp_path: Path, digits: Store) -> None:
    recipe = comparing(tmp_path)
    stage: Any = recipe.stages["evaluate"]
    spec = recipe.network_spec
    made = {"encoder": draw_encoder(spec, 1), "given": draw_encoder(spec, 2)}
    for name, encoder in made.items():
        save_encoder(encoder, tmp_path / name, {})
    instance = StageInstance("evaluate", 3, "f", tmp_path / "x", tmp_path / "encoder", given=tmp_path / "given")
    networks = build_extractors(StageContext.create(recipe, digits, on_ray=False), stage, instance)
    assert tuple(networks) == ARMS
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (made["encoder"], made["given"], draw_encoder(spec, 3))

    def mean_maps(encoder: Encoder) -> Tensor:
        return encoder(images)[-1].mean((2, 3))

    with torch.no_grad():
        for network, encoder in zip(networks.values(), expected, strict=True):
            torch.testing.assert_close(network(images)[0], mean_maps(encoder))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("auto", None), ("bf16", torch.bfloat16)])
def test_all_arms_compute_in_the_number_format_of_the_stage(
    tmp_path: Path, digits: Store, precision: str, dtype: torch.dtype | None
) -> None:
    recipe = comparing(tmp_path, stages__evaluate__precision=precision)
    stage: Any = recipe.stages["evaluate"]
    save_encoder(draw_encoder(recipe.network_spec, 1), tmp_path / "encoder", {})
    folders = {"encoder": tmp_path / "encoder", "given": tmp_path / "encoder"}
    instance = StageInstance("evaluate", 3, "f", tmp_path / "x", **folders)
    networks = build_extractors(StageContext.create(recipe, digits, on_ray=False), stage, instance)
    assert [network.autocast for network in networks.values()] == [dtype] * len(ARMS)


def test_results_have_the_scores_of_every_arm(compared: Recipe) -> None:
    evaluated, retrieved = result_of(compared, "evaluate"), result_of(compared, "retrieve")
    assert tuple(evaluated) == ARMS
    assert len({json.dumps(evaluated[arm]["signals"]) for arm in ARMS}) == 3
    assert {"gallery", "queries", *ARMS} == set(retrieved)
    assert {"labels", "tried", "pretrained", "given", "scratch"} == set(result_of(compared, "finetune"))
    found = read_tensors(folder_of(compared, "evaluate") / "map.safetensors")
    assert set(found) == {"ids", *(f"{arm}_{part}" for arm in ARMS for part in ("points", "share"))}


def test_mlflow_has_the_numbers_and_figures_of_every_arm(compared: Recipe) -> None:
    runs = runs_of(compared)
    client = mlflow.MlflowClient(TrackingLocation.of(compared).uri)

    def figures_of(name: str) -> set[str]:
        return {Path(file.path).stem for file in client.list_artifacts(runs[name].info.run_id, "figures")}

    assert {f"confusion_{arm}" for arm in ARMS} <= figures_of("evaluate seed 0")
    assert {f"neighbours_{arm}" for arm in ARMS} <= figures_of("retrieve seed 0")
    assert {"curves_given", "curves_arms", "filters"} <= figures_of("finetune seed 0")
    told = runs["evaluate seed 0"].data.metrics
    for measure in ("knn", "probe"):
        assert told[f"given/{measure}_test"] == result_of(compared, "evaluate")["given"][measure]["test"]
    parent = runs[compared.name].data.metrics
    assert parent["evaluate/knn/given/seed0"] == told["given/knn_test"]
    gain = 100 * (told["pretrained/knn_test"] - told["given/knn_test"])
    assert parent["evaluate/knn/pretrained/against_given/mean_gain_percent"] == pytest.approx(gain)


@pytest.mark.parametrize(
    ("stage", "label", "last"),
    [("evaluate", "kNN", "random"), ("retrieve", "mAP", "random"), ("finetune", "classify", "scratch")],
)
def test_lists_of_runs_show_given_weights_beside_the_baseline(
    compared: Recipe, stage: str, label: str, last: str
) -> None:
    lineage, _ = read_lineage(TrackingLocation.of(compared))
    (run,) = (run for run in lineage.runs.values() if run.name == f"{stage} seed 0")
    assert re.match(rf"{label} [\d.]+ % \(given [\d.]+, {last} [\d.]+\)", format_scores([run]))


def test_index_is_that_of_the_first_arm(compared: Recipe) -> None:
    manifest = json.loads((folder_of(compared, "retrieve") / "index" / "manifest.json").read_text())
    assert manifest["arm"] == "pretrained"


def test_report_has_both_tables_and_the_sentence_about_seeds(compared: Recipe) -> None:
    page = (compared.storage / compared.name / "report.html").read_text("utf-8")
    for text in ("pretrained against given", "given against random", "given against scratch", "random or scratch"):
        assert text in page
    assert re.search(r"There is no verdict on continued pretraining \(one seed\)", page)
    lineage = page[page.index('<section id="lineage"') : page.index('<section id="what-was-run"')]
    given = lineage[lineage.index("given weights") :]
    assert "weights.safetensors" in given
    for stage in ("pretrain", "evaluate", "retrieve", "finetune"):
        assert f"{stage} seed 0" in given, "all that was made from the given weights stands below them"
        assert f"{stage} seed 0" not in lineage.removesuffix(given)


def test_weights_alone_are_evaluated_without_any_pretraining(tmp_path: Path, compared: Recipe) -> None:
    raw = comparing(tmp_path).dump()
    for stage in raw["stages"].values():
        stage.pop("arms", None)
    stages = {name: raw["stages"][name] for name in ("evaluate", "retrieve", "finetune")}
    recipe = parse_recipe({**raw, "stages": stages})
    rows = run_recipe(recipe, QUIET).rows
    assert {(row.arm, row.baseline_arm) for row in rows} == {("given", "random"), ("given", "scratch")}
    for stage in ("evaluate", "retrieve", "finetune"):
        alone, beside = result_of(recipe, stage), result_of(compared, stage)
        assert "pretrained" not in alone
        assert alone["given"] == beside["given"], "the other arms change nothing"
    manifest = json.loads((folder_of(recipe, "retrieve") / "index" / "manifest.json").read_text())
    assert manifest["arm"] == "given"
    page = (recipe.storage / recipe.name / "report.html").read_text("utf-8")
    lineage = page[page.index('<section id="lineage"') : page.index('<section id="what-was-run"')]
    assert "evaluate seed 0" in lineage[lineage.index("given weights") :]


def test_given_arm_of_a_fine_tuning_starts_from_the_given_weights(tmp_path: Path, compared: Recipe) -> None:
    """With a rate of almost nothing, the encoder stays what it was."""
    changes = {"stages__finetune__learning_rates": [1e-30], "stages__finetune__arms": ["given", "scratch"]}
    recipe = comparing(tmp_path, **changes)
    recipe = recipe.model_copy(update={"stages": {"finetune": recipe.stages["finetune"]}})
    run_recipe(recipe, QUIET)
    kept = load_encoder(folder_of(recipe, "finetune") / "model", 8).state_dict()
    state = draw_encoder(recipe.network_spec, 7).state_dict()
    weights = [
        name for name in state if "running" not in name and "batches" not in name and not name.startswith("input")
    ]
    assert len(weights) >= 4
    for name in weights:
        np.testing.assert_allclose(kept[name], state[name], rtol=0, atol=1e-20, err_msg=name)
