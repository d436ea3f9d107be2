"""The index on disk, what it finds, and stages that evaluate layers and heads."""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report import image_figures
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages import retrieve
from firstlight.pipeline.stages.features.feature_index import IDS_FILE, VECTORS_FILE, FeatureIndex, open_index
from firstlight.pipeline.stages.features.frozen_features import build_extractors, compute_features
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.gloo import Pool

pytestmark = pytest.mark.usefixtures("undrawn_figures")
QUIET = Console(quiet=True)


def features(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


EVALUATE = {"kind": "evaluate", "knn_k": 5, "batch_size": 32, "probe_weight_decays": [0.001]}
LOOKS: dict[str, Any] = {
    "evaluate": {**EVALUATE, "layers": [0, -1], "pool": "grid"},
    "through_head": {**EVALUATE, "features": "head"},
    "retrieve": {"kind": "retrieve", "batch_size": 32, "precision_at": [1, 5]},
    "everything": {"kind": "retrieve", "batch_size": 32, "precision_at": [1], "gallery": "all", "features": "head"},
}


def looking(storage: Path, **changes: Any) -> Recipe:
    raw = recipes.recipe(storage, **changes).dump()
    return parse_recipe(
        {**raw, "stages": {"pretrain": raw["stages"]["pretrain"], **LOOKS, **changes.get("stages", {})}}
    )


def folder_of(storage: Path, stage: str) -> Path:
    (folder,) = (storage / "small").glob(f"{stage}-seed0-*")
    return folder


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a recipe with all that looks at features, run."""
    storage = tmp_path_factory.mktemp("looking")
    recipe = looking(storage)
    names = [row.measure for row in run_recipe(recipe, QUIET).rows]
    assert names == [
        *("kNN (k=5, layer 0)", "linear probe (layer 0)", "kNN (k=5, layer -1)", "linear probe (layer -1)"),
        *("kNN (k=5, head)", "linear probe (head)", "precision@1", "precision@5", "precision@1 (head)"),
    ]
    return storage


def result(storage: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((folder_of(storage, stage) / "result.json").read_text()))


def test_every_layer_has_its_scores_in_mlflow(looked: Path) -> None:
    client = mlflow.MlflowClient(TrackingLocation.of(looking(looked)).uri)
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("firstlight").experiment_id])}
    told = runs["evaluate seed 0"].data.metrics
    for layer, dimensions in ((0, 4 * 4 * 4), (-1, 8 * 2 * 2)):
        assert told[f"random/dimensions_layer{layer}"] == dimensions
        for measure in ("knn", "probe"):
            assert (
                told[f"pretrained/{measure}_layer{layer}_test"]
                <= told[f"pretrained/{measure}_layer{layer}_test_top5"]
                <= 1
            )
    assert {"pretrained/knn_test", "random/probe_val", "pretrained/rankme", "pretrained/feature_std"} <= runs[
        "through_head seed 0"
    ].data.metrics.keys()
    found = runs["retrieve seed 0"]
    assert found.data.metrics["pretrained/precision_at_5"] == result(looked, "retrieve")["pretrained"]["precision"]["5"]
    assert {a.path for a in client.list_artifacts(found.info.run_id, "index")} == {
        f"index/{n}" for n in (IDS_FILE, VECTORS_FILE, "manifest.json")
    }
    assert {a.path for a in client.list_artifacts(found.info.run_id, "figures")} == {
        f"figures/neighbours_{a}.png" for a in ("pretrained", "random")
    }


def make_context(storage: Path) -> StageContext:
    return StageContext.create(looking(storage), Store.open(next((storage / "stores").iterdir())), on_ray=False)


def test_precision_is_that_of_all_cosines_and_a_query_never_finds_itself(looked: Path) -> None:
    context, told = make_context(looked), result(looked, "everything")
    pretrained = folder_of(looked, "pretrain")
    instance = StageInstance(
        "everything", 0, "f", looked / "again", pretrained / "encoder", {"head": pretrained / "head"}
    )
    stage: Any = context.recipe.stages["everything"]
    splits = context.splits
    ids = np.sort(np.concatenate((splits.train, splits.val, splits.test)))
    swept = compute_features(context, build_extractors(context, stage, instance), ids, instance, 32)
    for arm, (found,) in swept.items():
        assert found.shape[1] == 8
        cosines = (found @ found.T).fill_diagonal_(-2)[np.searchsorted(ids, splits.test)]
        right = splits.labels[ids[cosines.argmax(1).numpy()]] == splits.labels[splits.test]
        assert told[arm]["precision"]["1"] == pytest.approx(right.mean())
        assert all(query not in row and len(row) == 8 for query, row in told[arm]["shown"])
    assert told["pretrained"] != told["random"]
    assert [len(told[arm]["shown"]) for arm in swept] == [8, 8]


def test_the_index_holds_the_gallery_with_paths_and_labels(looked: Path) -> None:
    context, folder = make_context(looked), folder_of(looked, "retrieve") / "index"
    rows = pq.read_table(folder / IDS_FILE).to_pydict()
    assert rows["id"] == context.splits.train.tolist()
    assert rows["label"] == context.splits.labels[context.splits.train].tolist()
    stored = pa.concat_tables(
        [pq.read_table(context.store.path / shard.file, columns=["id", "path"]) for shard in context.store.shards]
    ).to_pydict()
    paths = dict(zip(stored["id"], stored["path"], strict=True))
    assert rows["path"] == [paths[i] for i in rows["id"]]
    assert len(set(rows["path"])) == len(rows["path"])
    some = np.array([0, 3, len(paths) - 1])  # of both splits
    assert context.store.read_paths(some) == [paths[i] for i in some.tolist()]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dimensions"] == 8
    assert manifest["precision"] == "fp32"
    assert manifest["store"] == context.store.hash


def on_this_rank(folder: str, store: str, encoder: str) -> None:
    context = StageContext.create(looking(Path(folder)), Store.open(Path(store)), on_ray=False)
    for name in ("retrieve", "evaluate"):
        stage: Any = context.recipe.stages[name]
        stage_kind(stage).run(context, stage, StageInstance(name, 0, "f", Path(folder) / name, Path(encoder)))


def test_two_workers_find_what_one_finds(looked: Path, pool: Pool, tmp_path: Path) -> None:
    store, encoder = str(next((looked / "stores").iterdir())), str(folder_of(looked, "pretrain") / "encoder")
    pool.run(on_this_rank, str(tmp_path), store, encoder)
    for name in ("retrieve", "evaluate"):
        both = json.loads((tmp_path / name / "result.json").read_text())
        for arm in ("pretrained", "random"):
            for key, value in result(looked, name)[arm].items():
                if key != "shown" and "probe" not in key and "confusion" not in key:
                    assert both[arm][key] == pytest.approx(value, rel=1e-4), key
    assert (
        open_index(tmp_path / "retrieve" / "index").ids.tolist()
        == open_index(folder_of(looked, "retrieve") / "index").ids.tolist()
    )


def test_accuracies_of_the_head_are_scikit_learns(looked: Path) -> None:
    context = make_context(looked)
    pretrained, splits = folder_of(looked, "pretrain"), context.splits
    instance = StageInstance(
        "through_head", 0, "f", looked / "again2", pretrained / "encoder", {"head": pretrained / "head"}
    )
    stage: Any = context.recipe.stages["through_head"]
    ids = np.concatenate((splits.train, splits.test))
    ((found,),) = compute_features(
        context, {"pretrained": build_extractors(context, stage, instance)["pretrained"]}, ids, instance, 32
    ).values()
    train, test = (
        part.numpy() for part in found.split([len(splits.train), len(splits.test)])
    )  # unit vectors: cosine = 1 - distance^2 / 2
    voting = KNeighborsClassifier(5, weights=lambda distances: np.exp((1 - distances**2 / 2) / 0.1), algorithm="brute")
    shares = voting.fit(train, splits.labels[splits.train]).predict_proba(test)
    labels, told = splits.labels[splits.test], result(looked, "through_head")["pretrained"]["knn"]
    assert told["test"] == pytest.approx((shares.argmax(1) == labels).mean())
    named = shares[np.arange(len(labels)), labels] > 0
    assert told["test_top5"] == pytest.approx(named.mean()), "five neighbours name at most five classes"


def test_a_head_by_reference_is_that_of_the_run_that_made_the_encoder(looked: Path) -> None:
    client = mlflow.MlflowClient(TrackingLocation.of(looking(looked)).uri)
    runs = client.search_runs([client.get_experiment_by_name("firstlight").experiment_id])
    run_id = next(r.info.run_id for r in runs if r.info.run_name == "pretrain seed 0")
    for reference in (
        f"runs:/{run_id}/encoder",
        f"models:/{client.search_logged_models([runs[0].info.experiment_id])[0].model_id}",
    ):
        recipe = looking(looked, name="referring")
        through = recipe.stages["through_head"].model_copy(update={"encoder": reference})
        run_recipe(recipe.model_copy(update={"stages": {"through_head": through}}), QUIET)
    results = [json.loads(file.read_text()) for file in (looked / "referring").glob("through_head-seed0-*/result.json")]
    assert results
    assert all(found == result(looked, "through_head") for found in results)


def without_head(storage: Path) -> Recipe:
    raw = looking(storage).dump()
    raw["stages"]["pretrain"] |= {"method": {"name": "dae"}}
    return parse_recipe({**raw, "name": "denoising", "stages": {"pretrain": raw["stages"]["pretrain"]}})


def test_encoder_whose_run_has_no_head_is_refused(looked: Path) -> None:
    recipe = without_head(looked)
    run_recipe(recipe, QUIET)
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    runs = client.search_runs([client.get_experiment_by_name("firstlight").experiment_id])
    run_id = next(
        r.info.run_id
        for r in runs
        if r.info.run_name == "pretrain seed 0" and r.data.params["stage.method.name"] == "dae"
    )
    through = looking(looked).stages["through_head"].model_copy(update={"encoder": f"runs:/{run_id}/encoder"})
    with pytest.raises(UserError) as told:
        run_recipe(recipe.model_copy(update={"stages": {"through_head": through}}), QUIET)
    expected = (
        f"stages.through_head.features: 'head' is not valid: run {run_id}, "
        f"which made 'runs:/{run_id}/encoder', has decoder, encoder"
    )
    assert str(told.value) == expected


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            "evaluate",
            {"layers": [0, 2]},
            "stages.evaluate.layers: 2 is not one of the encoder's 2 feature maps; valid: -2 to 1",
        ),
        (
            "retrieve",
            {"layer": -3},
            "stages.retrieve.layer: -3 is not one of the encoder's 2 feature maps; valid: -2 to 1",
        ),
        (
            "evaluate",
            {"features": "head", "pool": "avg"},
            "stages.evaluate.layers: [0, -1] is not valid with features: head",
        ),
        ("retrieve", {"features": "head", "layer": 1}, "stages.retrieve.layer: [1] is not valid with features: head"),
        (
            "retrieve",
            {"features": "head", "pool": "grid"},
            "stages.retrieve.pool: grid is not valid with features: head",
        ),
        (
            "retrieve",
            {"precision_at": [1, 111]},
            "stages.retrieve.precision_at: 111 is more than the 110 images that a query can find; valid: 1 to 110",
        ),
        ("retrieve", {"gallery": "test", "precision_at": [60]}, "precision_at: 60 is more than the 59 images"),
        (
            "through_head",
            {"method": "dae"},
            "stages.through_head.features: 'head' is not valid: dae of stages.pretrain makes no head but decoder",
        ),
    ],
)
def test_impossible_features_are_one_line(looked: Path, stage: str, changes: dict[str, Any], message: str) -> None:
    raw = looking(looked).dump()
    if "method" in changes:
        raw["stages"]["pretrain"]["method"] = {"name": changes["method"]}
    else:
        raw["stages"][stage] |= changes
    with pytest.raises(UserError) as told:
        run_recipe(parse_recipe(raw), QUIET)
    assert message in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_without_labels_there_is_an_index_and_a_picture(tmp_path: Path, digits: Store) -> None:
    context = StageContext.create(looking(tmp_path), digits, on_ray=False)
    context.splits.labels[:] = -1
    stage: Any = context.recipe.stages["retrieve"]
    index = FeatureIndex.from_features(context.splits.train, features(len(context.splits.train)))
    out = retrieve._measure_retrieval(
        stage, index, (context.splits.test, features(len(context.splits.test), seed=2)), context.splits.labels
    )
    assert out.keys() == {"shown"}
    assert image_figures.draw_neighbours(context, out["shown"], "pretrained") is not None


def test_images_without_a_label_are_neither_right_nor_wrong(tmp_path: Path, digits: Store) -> None:
    context = StageContext.create(looking(tmp_path), digits, on_ray=False)
    splits, x = context.splits, features(len(digits.labels("train")) + len(digits.labels("test")))
    stage: Any = context.recipe.stages["retrieve"]
    splits.labels[splits.train[::2]] = -1
    some = splits.train[1::2]
    args = stage, (splits.test, x[splits.test]), splits.labels
    mixed = retrieve._measure_retrieval(args[0], FeatureIndex.from_features(splits.train, x[splits.train]), *args[1:])
    known = retrieve._measure_retrieval(args[0], FeatureIndex.from_features(some, x[some]), *args[1:])
    assert mixed["precision"] == known["precision"]
    assert mixed["mean_average_precision"] == known["mean_average_precision"]


def half_labelled(storage: Path, store: Store, **keys: Any) -> tuple[StageContext, Any]:
    """The context of a stage whose training images have every second label, and the stage `retrieve` with `keys`."""
    context = StageContext.create(looking(storage), store, on_ray=False)
    context.splits.labels[context.splits.train[::2]] = -1
    return context, context.recipe.stages["retrieve"].model_copy(update=keys)


@pytest.mark.parametrize("gallery", ["train", "all"])
def test_labelled_gallery_is_searched_alone(tmp_path: Path, digits: Store, gallery: str) -> None:
    """Every image that is found is right or wrong, so that a wrong one has a red frame."""
    context, stage = half_labelled(tmp_path, digits, gallery=gallery, labelled_gallery=True)
    everything = half_labelled(tmp_path, digits, gallery=gallery)
    ids, more = (retrieve.gallery_ids(each, context.splits) for each in (stage, everything[1]))
    assert ids.tolist() == [i for i in more.tolist() if context.splits.labels[i] >= 0]
    assert 0 < len(ids) < len(more)
    x = features(int(more.max()) + int(context.splits.test.max()))
    asked = context.splits.test, x[context.splits.test]
    shown = [
        retrieve._measure_retrieval(stage, FeatureIndex.from_features(found, x[found]), asked, context.splits.labels)
        for found in (ids, more)
    ]
    known = [(context.splits.labels[[i for _, row in out["shown"] for i in row]] >= 0).mean() for out in shown]
    assert known[0] == 1.0 > known[1]


def test_gallery_without_any_label_is_refused(tmp_path: Path, digits: Store) -> None:
    context, stage = half_labelled(tmp_path, digits, labelled_gallery=True)
    context.splits.labels[context.splits.train] = -1
    with pytest.raises(UserError, match=r"^stages\.retrieve\.labelled_gallery: true leaves no image: .*valid: false$"):
        stage_kind(stage).check_images("retrieve", stage, context.recipe, context.splits)
