"""Embeddings are those of the encoder in order of ids, the same bits however they are made; damaged files are named."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.data.mirror.places import TravellingPath
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages import embed
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder, save_encoder
from firstlight.pipeline.stages.embed import EmbedStage, build_network, open_embeddings
from firstlight.pipeline.stages.features.frozen_features import prepare_for_inference
from firstlight.pipeline.stages.sections.embed import Embed
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from tests.support import recipes


def setting(
    tmp_path: Path, digits: Store, on_ray: bool = False, name: str = "f", **changes: Any
) -> tuple[StageContext, Embed, StageInstance]:
    raw = recipes.recipe(tmp_path, **{key: value for key, value in changes.items() if "__" in key}).dump()
    stage = {"kind": "embed", "encoder": "models:/none/1", "batch_size": 16, "rows_per_file": 50}
    recipe = parse_recipe(
        {**raw, "stages": {"embed": {**stage, **{key: value for key, value in changes.items() if "__" not in key}}}}
    )
    if not (tmp_path / "encoder").exists():
        torch.manual_seed(0)
        save_encoder(Encoder(recipe.network_spec, 8), tmp_path / "encoder", {})
    instance = StageInstance("embed", 0, name, tmp_path / f"embed-seed0-{name}", tmp_path / "encoder")
    instance.folder.mkdir(exist_ok=True)
    return StageContext.create(recipe, digits, on_ray), recipe.stages["embed"], instance  # type: ignore[return-value]


def files_of(instance: StageInstance) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (instance.folder / "embeddings").iterdir()}


def test_embeddings_are_those_of_the_encoder_in_order_of_ids(tmp_path: Path, digits: Store) -> None:
    context, stage, instance = setting(tmp_path, digits)
    EmbedStage().run(context, stage, instance)
    folder = instance.folder / "embeddings"
    encoder = load_encoder(tmp_path / "encoder", 8).eval()
    for split in ("train", "val", "test"):
        ids, found = open_embeddings(folder, split)
        assert np.array_equal(ids, getattr(context.splits, split))
        with torch.no_grad():
            own = torch.cat(
                [encoder(batch.views[0])[-1].mean((2, 3)) for batch in context.iterate_batches(ids, 16)]
            ).numpy()
        assert np.allclose(found, own, atol=1e-6)
    ids, found = open_embeddings(folder)
    assert found.shape == (len(ids), encoder.shapes[-1][0])
    assert len(ids) == 180
    table = pq.read_table(folder / "train-00000.parquet")
    assert table.schema.names == ["id", "path", "label", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[8]"
    assert table.column("label").to_pylist() == context.splits.labels[context.splits.train[:50]].tolist()
    stored = {
        row["id"]: row["path"]
        for s in digits.shards
        for row in pq.read_table(digits.path / s.file, columns=["id", "path"]).to_pylist()
    }
    assert table.column("path").to_pylist() == [stored[i] for i in table.column("id").to_pylist()]
    shards = {"test": 2, "train": 3, "val": 1}
    assert sorted(files_of(instance)) == [
        "manifest.json",
        *(f"{split}-{k:05d}.parquet" for split, count in shards.items() for k in range(count)),
    ]


def test_half_precision_and_chosen_splits(tmp_path: Path, digits: Store) -> None:
    context, stage, instance = setting(tmp_path, digits, dtype="float16", splits=["test"])
    EmbedStage().run(context, stage, instance)
    ids, found = open_embeddings(instance.folder / "embeddings")
    assert np.array_equal(ids, context.splits.test)
    assert found.dtype == np.float16
    with pytest.raises(UserError, match="has no split 'train'; valid: test"):
        open_embeddings(instance.folder / "embeddings", "train")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("auto", None), ("bf16", torch.bfloat16)])
def test_embeddings_are_computed_in_the_number_format_of_the_stage(
    tmp_path: Path, digits: Store, precision: str, dtype: torch.dtype | None
) -> None:
    context, stage, instance = setting(tmp_path, digits, precision=precision)
    EmbedStage().run(context, stage, instance)
    ids, found = open_embeddings(instance.folder / "embeddings", "val")
    network = FeatureExtractor(load_encoder(tmp_path / "encoder", 8), None, (-1,), "avg", dtype)
    prepare_for_inference(network, torch.device("cpu"))
    with torch.no_grad():
        own = torch.cat([network(batch.views[0])[0] for batch in context.iterate_batches(ids, 16)]).numpy()
    assert np.array_equal(found, own)
    assert json.loads(files_of(instance)["manifest.json"])["precision"] == precision


def test_values_beyond_half_precision_are_refused(tmp_path: Path, digits: Store) -> None:
    context, stage, instance = setting(tmp_path, digits, dtype="float16")
    encoder = load_encoder(tmp_path / "encoder", 8)
    with torch.no_grad():
        encoder.stages[-1][1].weight.fill_(1e6)
    save_encoder(encoder, tmp_path / "encoder", {})
    with pytest.raises(StageFailed, match=r"the embedding of image \d+ is not finite in float16"):
        EmbedStage().run(context, stage, instance)
    assert not list((instance.folder / "embeddings").iterdir())


@pytest.mark.fault(8, "an embedding stage is killed")
@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: flip(file)]
)
def test_killed_stage_makes_only_missing_files(
    tmp_path: Path, digits: Store, harm: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, stage, instance = setting(tmp_path, digits)
    EmbedStage().run(context, stage, instance)
    before = files_of(instance)
    harm(instance.folder / "embeddings" / "train-00001.parquet")
    with pytest.raises(UserError, match=r"train-00001\.parquet: is missing or damaged: .*; delete .* and run again"):
        open_embeddings(instance.folder / "embeddings", "train")
    put: list[str] = []
    real = embed._EmbeddingWriter._write_file
    monkeypatch.setattr(
        embed._EmbeddingWriter, "_write_file", lambda self, file, rows: (put.append(file.name), real(self, file, rows))
    )
    EmbedStage().run(context, stage, instance)
    assert put == ["train-00001.parquet"]
    assert files_of(instance) == before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"format": 2}',
     '{"format": 1, "dtype": "float32", "size": 8, "counts": {}, "files": [{"file": "../x"}]}',
     '{"format": 1, "dtype": "float32", "size": 8, "counts": {}, "files": '
     '[{"file": "../x", "split": "train", "count": 1, "bytes": 1, "sha256": ""}]}'],
)  # fmt: skip
def test_invalid_manifest_is_named(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json: is not a whole manifest of embeddings"):
        open_embeddings(tmp_path)


@pytest.mark.ray
def test_two_actors_on_ray_make_the_same_bits_as_this_process(tmp_path: Path, digits: Store, ray_local: None) -> None:
    EmbedStage().run(*setting(tmp_path, digits, name="alone"))
    for workers in (2, 1):
        context, stage, instance = setting(
            tmp_path, digits, True, f"ray{workers}", scale__workers=workers, scale__cpus_per_worker=0.5
        )
        EmbedStage().run(context, stage, instance)
        assert files_of(instance) == files_of(setting(tmp_path, digits, name="alone")[2])


def dying(
    folder: TravellingPath, image_size: int, threads: int, gpu: bool, precision: str
) -> Callable[[np.ndarray], np.ndarray]:
    """An encoder that takes its process with it, once, in the second batch."""
    whole, marks = (
        build_network(folder, image_size, threads, gpu, precision),
        [folder.path.parent / name for name in ("first", "second")],
    )

    def embed_or_die(pixels: np.ndarray) -> np.ndarray:
        fresh = [mark for mark in marks if not mark.exists()]
        for mark in fresh[:1]:
            mark.touch()
        if len(fresh) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(pixels)

    return embed_or_die


@pytest.mark.fault(1, "an actor of Ray Data is killed")
@pytest.mark.ray
def test_killed_actor_is_replaced(
    tmp_path: Path, digits: Store, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    EmbedStage().run(*setting(tmp_path, digits, name="alone"))
    monkeypatch.setattr(embed, "build_network", dying)
    context, stage, instance = setting(tmp_path, digits, True, scale__workers=1, scale__cpus_per_worker=0.5)
    EmbedStage().run(context, stage, instance)
    assert (tmp_path / "second").exists(), "it was killed"
    assert files_of(instance) == files_of(setting(tmp_path, digits, name="alone")[2])
    assert "it continues after the files that are whole" in (instance.folder / "metrics.jsonl").read_text()
    for mark in ("first", "second"):
        (tmp_path / mark).unlink()
    with pytest.raises(StageFailed, match="embed seed 0: ") as caught:
        EmbedStage().run(
            *setting(
                tmp_path, digits, True, "none", scale__workers=1, scale__cpus_per_worker=0.5, scale__max_failures=0
            )
        )
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.ray
def test_damaged_store_is_one_line_on_ray(tmp_path: Path, ray_local: None) -> None:
    store = recipes.store(tmp_path)
    shard = store.path / store.shards[0].file
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    context, stage, instance = setting(tmp_path, store, True, scale__workers=1, scale__cpus_per_worker=0.5)
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"train-00000\.parquet: is missing or damaged") as caught:
        EmbedStage().run(context, stage, instance)
    assert len(str(caught.value).splitlines()) == 1
    assert instance.result is None


def test_recipe_publishes_embeddings_and_their_map(tmp_path: Path, undrawn_figures: None) -> None:
    raw = recipes.recipe(tmp_path).dump()
    raw["stages"] = {"pretrain": raw["stages"]["pretrain"], "embed": {"kind": "embed", "splits": ["val"]}}
    recipe = parse_recipe(raw)
    assert run_recipe(recipe, Console(quiet=True)).rows == []
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    (found,) = client.search_runs(
        [client.get_experiment_by_name("firstlight").experiment_id], "tags.firstlight.stage = 'embed'"
    )
    assert {a.path for a in client.list_artifacts(found.info.run_id, "embeddings")} == {
        f"embeddings/{n}" for n in ("manifest.json", "val-00000.parquet")
    }
    assert [a.path for a in client.list_artifacts(found.info.run_id, "figures")] == ["figures/map.png"]
    manifest = json.loads(next((tmp_path / "small").glob("embed-*/embeddings/manifest.json")).read_text())
    assert found.data.metrics["images"] == manifest["counts"]["val"] > 0
    store = Store.open(next((tmp_path / "stores").iterdir()))
    assert manifest["store"] == store.hash
