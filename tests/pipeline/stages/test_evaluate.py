"""kNN over a memory bank: what the bank holds, its score, its way from one recipe to another, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from torch import Tensor

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import data_checks
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.artifacts.table_folder import SavedTable, load_table, save_table
from firstlight.pipeline.stages.features.frozen_features import build_extractors, compute_features
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes, references
from tests.support.gloo import Pool
from tests.support.recipe_runs import QUIET, runs_of

pytestmark = pytest.mark.usefixtures("undrawn_figures")
# The bank has 16 bits, the harder case of its types: the scores are computed in 32 bits.
SUPER_AND = {
    "name": "super_and",
    "dim": 8,
    "rounds": 2,
    "variant": "reference",
    "initial": "multiple",
    "bank_dtype": "float16",
}
OF_BANK = {
    **{"kind": "evaluate", "knn_k": 5, "batch_size": 32, "features": "head", "knn_bank": True},
    "probe_weight_decays": [0.001],
}


def banked(storage: Path, **changes: Any) -> Recipe:
    """A pretraining with a memory bank, and its evaluation. `changes` are dotted keys with `__` for the dot."""
    changed = {"stages__pretrain__method": SUPER_AND, "stages__evaluate": dict(OF_BANK), **changes}
    recipe = recipes.recipe(storage, **changed)
    stages = {name: recipe.stages[name] for name in ("pretrain", "evaluate")}
    return recipe.model_copy(update={"stages": stages})


def folder_of(storage: Path, stage: str, name: str = "small") -> Path:
    (folder,) = (storage / name).glob(f"{stage}-seed0-*")
    return folder


def result_of(storage: Path, name: str = "small") -> dict[str, Any]:
    return dict(json.loads((folder_of(storage, "evaluate", name) / "result.json").read_text()))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a recipe that was evaluated over its bank."""
    storage = tmp_path_factory.mktemp("banked")
    rows = run_recipe(banked(storage), QUIET).rows
    assert [row.measure for row in rows] == ["kNN (k=5, memory bank)", "kNN (k=5, head)", "linear probe (head)"]
    of_bank, of_head, _ = rows
    assert of_bank.baseline == of_head.baseline, "random weights have no bank"
    assert of_bank.key == "knn_bank"
    return storage


def make_context(storage: Path) -> StageContext:
    return StageContext.create(banked(storage), Store.open(next((storage / "stores").iterdir())), on_ray=False)


def test_bank_holds_the_rows_of_the_training_images_and_no_others(evaluated: Path) -> None:
    splits, folder = make_context(evaluated).splits, folder_of(evaluated, "pretrain")
    bank = load_table(folder / "bank")
    assert bank.ids.tolist() == splits.train.tolist()
    assert not np.isin(bank.ids, np.concatenate((splits.val, splits.test))).any()
    found, _ = Checkpoints(folder / "checkpoints").read_newest()
    assert found is not None
    (shard,) = found.shards
    assert torch.equal(bank.values, shard["bank"]["rows"])
    described = json.loads((folder / "bank" / "table.json").read_text())
    assert described["method"]["name"] == "super_and"
    assert described["store"] == make_context(evaluated).store.hash


def head_features(storage: Path, ids: np.ndarray) -> Tensor:
    context, folder = make_context(storage), folder_of(storage, "pretrain")
    instance = StageInstance("evaluate", 0, "f", storage / "again", folder / "encoder", {"head": folder / "head"})
    stage: Any = context.recipe.stages["evaluate"]
    networks = {"pretrained": build_extractors(context, stage, instance)["pretrained"]}
    ((found,),) = compute_features(context, networks, ids, instance, 32).values()
    return found


@pytest.mark.parametrize("part", ["val", "test"])
def test_score_is_the_papers_formula_over_the_bank(evaluated: Path, part: str) -> None:
    splits, bank = make_context(evaluated).splits, load_table(folder_of(evaluated, "pretrain") / "bank")
    ids = {"val": splits.val, "test": splits.test}[part]
    rows, labels = bank.values.double().tolist(), splits.labels[bank.ids].tolist()
    found = [
        references.weighted_knn(v, rows, labels, 5, 0.1, cosine=False)
        for v in head_features(evaluated, ids).double().tolist()
    ]
    scores = result_of(evaluated)["pretrained"]
    assert scores["knn_bank"][part] == pytest.approx((np.asarray(found) == splits.labels[ids]).mean())


def test_bank_and_embedded_images_are_different_galleries(evaluated: Path) -> None:
    """Otherwise the test above could pass with the wrong one."""
    bank = load_table(folder_of(evaluated, "pretrain") / "bank")
    embedded = head_features(evaluated, bank.ids)
    assert embedded.shape == bank.values.shape
    assert float((embedded - bank.values).norm(dim=1).mean()) > 0.1
    result = result_of(evaluated)
    assert "knn_bank" not in result["random"]
    assert result["pretrained"]["knn_bank"] != result["pretrained"]["knn"]


def test_mlflow_has_the_bank_and_its_score(evaluated: Path) -> None:
    runs = runs_of(banked(evaluated))
    client = mlflow.MlflowClient(TrackingLocation.of(banked(evaluated)).uri)
    files = {entry.path for entry in client.list_artifacts(runs["pretrain seed 0"].info.run_id, "bank")}
    assert files == {"bank/manifest.json", "bank/table.json", "bank/table.safetensors"}
    logged = runs["evaluate seed 0"].data.metrics
    assert logged["pretrained/knn_bank_test"] == result_of(evaluated)["pretrained"]["knn_bank"]["test"]
    assert "random/knn_bank_test" not in logged


def test_searches_can_judge_by_the_bank(evaluated: Path) -> None:
    recipe, folder = banked(evaluated), folder_of(evaluated, "evaluate")
    stage = recipe.stages["evaluate"]
    assert "knn_bank" in stage_kind(stage).objectives(stage)
    value = stage_kind(stage).read_objective(stage, "knn_bank", StageInstance("evaluate", 0, "f", folder))
    assert value == result_of(evaluated)["pretrained"]["knn_bank"]["val"]
    plain = banked(evaluated, stages__evaluate__knn_bank=False).stages["evaluate"]
    assert "knn_bank" not in stage_kind(plain).objectives(plain)


def referring(storage: Path, name: str, reference: str, **changes: Any) -> Recipe:
    """A recipe that evaluates an encoder of MLflow over the bank that its run has kept."""
    recipe = banked(storage, name=name, stages__evaluate={**OF_BANK, "encoder": reference}, **changes)
    return recipe.model_copy(update={"stages": {"evaluate": recipe.stages["evaluate"]}})


def run_id_of(recipe: Recipe) -> str:
    return str(runs_of(recipe)["pretrain seed 0"].info.run_id)


@pytest.mark.parametrize("kind", ["runs", "models"])
def test_encoder_of_mlflow_comes_with_the_bank_of_its_run(evaluated: Path, kind: str) -> None:
    recipe = banked(evaluated)
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    experiments = [client.get_experiment_by_name("firstlight").experiment_id]
    models = {model.source_run_id: model.model_id for model in client.search_logged_models(experiments)}
    run_id = run_id_of(recipe)
    reference = f"runs:/{run_id}/encoder" if kind == "runs" else f"models:/{models[run_id]}"
    run_recipe(referring(evaluated, kind, reference), QUIET)
    assert result_of(evaluated, kind) == result_of(evaluated)


def test_encoder_whose_run_has_no_bank_is_refused(evaluated: Path) -> None:
    recipe = recipes.recipe(evaluated, name="bankless", stages__pretrain__epochs=1)
    run = run_recipe(recipe.model_copy(update={"stages": {"pretrain": recipe.stages["pretrain"]}}), QUIET)
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    children = client.search_runs(
        [client.get_experiment_by_name("firstlight").experiment_id], f"tags.`mlflow.parentRunId` = '{run.run_id}'"
    )
    run_id = next(child.info.run_id for child in children if child.info.run_name == "pretrain seed 0")
    with pytest.raises(UserError) as told:
        run_recipe(referring(evaluated, "none", f"runs:/{run_id}/encoder"), QUIET)
    assert str(told.value) == (
        f"stages.evaluate.knn_bank: 'bank' is not valid: run {run_id}, which made 'runs:/{run_id}/encoder', has "
        "encoder, head"
    )


@pytest.mark.parametrize("changes", [{"dataset__val_fraction": 0.3}, {"dataset__max_train": 100}])
def test_bank_of_other_images_is_refused_before_anything_is_computed(evaluated: Path, changes: dict[str, Any]) -> None:
    """With a larger held-out part, images that are scored would be in the bank."""
    reference = f"runs:/{run_id_of(banked(evaluated))}/encoder"
    with pytest.raises(UserError) as told:
        run_recipe(referring(evaluated, "others", reference, **changes), QUIET)
    text = str(told.value)
    assert text.startswith(f"stages.evaluate.knn_bank: true is not valid: the memory bank of '{reference}' lacks ")
    assert text.endswith("others; valid: false, or the dataset keys (val_fraction, max_train) of its pretraining")
    assert not list((evaluated / "others").glob("evaluate-*"))


def test_bank_of_another_store_is_refused(evaluated: Path) -> None:
    """The same ids are other images there."""
    context, companions = make_context(evaluated), {"bank": folder_of(evaluated, "pretrain") / "bank"}
    recipe = referring(evaluated, "others", "models:/digits@best")
    data_checks.check_companion_images(recipe, {"evaluate": companions}, context.store.hash, context.splits)
    with pytest.raises(
        UserError, match=r"^stages\.evaluate\.knn_bank: .* 'models:/digits@best' is of the images of an"
    ):
        data_checks.check_companion_images(recipe, {"evaluate": companions}, "ab" * 32, context.splits)


def test_bank_of_another_dimension_is_refused(evaluated: Path, tmp_path: Path) -> None:
    recipe, pretrained = banked(evaluated), folder_of(evaluated, "pretrain")
    save_table(SavedTable(np.arange(3), torch.zeros(3, 5), "x"), tmp_path / "bank", {})
    stage = recipe.stages["evaluate"]
    companions = {"head": pretrained / "head", "bank": tmp_path / "bank"}
    with pytest.raises(UserError, match=r"^stages\.evaluate\.knn_bank: .* shape \(5,\), .* gives 8 features; valid: f"):
        stage_kind(stage).check_companions("evaluate", stage, recipe, companions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages__pretrain__method": {"name": "nat"}},
            "stages.evaluate.knn_bank: true is not valid: nat of stages.pretrain keeps no memory bank; valid: false",
        ),
        (
            {"stages__evaluate__features": "encoder"},
            "stages.evaluate.knn_bank: true is not valid with features: encoder: a memory bank holds the outputs of a "
            "head; valid: features: head",
        ),
    ],
)
def test_pretraining_without_a_bank_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        run_recipe(banked(tmp_path, **changes), QUIET)
    assert str(told.value) == message


def test_damaged_bank_is_named(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated, tmp_path / "copy")
    file = folder_of(tmp_path / "copy", "pretrain") / "bank" / "table.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"bank: is not a whole table: .*table\.safetensors: has \d+ bytes"):
        run_recipe(parse_recipe(banked(tmp_path / "copy").dump()), QUIET)


def pretrain_on_this_rank(folder: str, store: str) -> None:
    context = StageContext.create(banked(Path(folder)), Store.open(Path(store)), on_ray=False)
    stage = context.recipe.stages["pretrain"]
    stage_kind(stage).run(context, stage, StageInstance("pretrain", 0, "f", Path(folder) / "job"))


def test_workers_hand_on_the_whole_bank(evaluated: Path, tmp_path: Path, pool: Pool) -> None:
    pool.run(pretrain_on_this_rank, str(tmp_path), str(next((evaluated / "stores").iterdir())))
    found, one = load_table(tmp_path / "job" / "bank"), load_table(folder_of(evaluated, "pretrain") / "bank")
    assert found.ids.tolist() == one.ids.tolist()
    torch.testing.assert_close(found.values, one.values, rtol=1e-3, atol=1e-4)
