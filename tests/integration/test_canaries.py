"""Files that act when they are unpickled, in the place of every artifact that is read.

Each must be refused in one line, and must not act.
"""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from firstlight.pipeline.data.manifest import manifest_hash
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StopTraining, UserError
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.search.ledger import LEDGER_FILE, OUTCOME_FILE, SearchState, Trial
from firstlight.pipeline.stages.artifacts.companions import load_decoder, load_head
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder, save_encoder
from firstlight.pipeline.stages.features.feature_index import (
    IDS_FILE,
    VECTORS_FILE,
    FeatureIndex,
    open_index,
    save_index,
)
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.references import fetch_reference
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST, write_file, write_manifest
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes

# Relative: a canary that is unpickled leaves this file in the current folder, which is that of its test.
ACTED = Path("canary-acted")


class Canary:
    def __reduce__(self) -> Any:
        return (Path.touch, (ACTED,))


def _written(write: Callable[[io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _arrays() -> np.ndarray:
    return np.array([Canary()], dtype=object)


CANARIES: dict[str, bytes] = {
    "pickle": pickle.dumps(Canary()),
    "torch": _written(lambda file: torch.save(Canary(), file)),  # a zip
    "torch, old": _written(lambda file: torch.save(Canary(), file, _use_new_zipfile_serialization=False)),
    "npy": _written(lambda file: np.save(file, _arrays(), allow_pickle=True)),
    "npz": _written(lambda file: np.savez(file, x=_arrays())),
}
EACH = pytest.mark.parametrize("canary", CANARIES.values(), ids=CANARIES)


@pytest.fixture(autouse=True)
def _none_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not ACTED.exists()


def test_canary_leaves_its_file_only_in_the_folder_of_its_test(tmp_path: Path) -> None:
    """Two checkouts can be tested at once."""
    pickle.loads(CANARIES["pickle"])
    assert (tmp_path / ACTED.name).exists()
    assert not ACTED.is_absolute()
    ACTED.unlink()


def test_each_canary_acts_when_it_is_unpickled() -> None:
    readers: dict[str, Callable[[io.BytesIO], Any]] = {
        "pickle": pickle.load,
        "torch": lambda file: torch.load(file, weights_only=False),
        "torch, old": lambda file: torch.load(file, weights_only=False),
        "npy": lambda file: np.load(file, allow_pickle=True),
        "npz": lambda file: np.load(file, allow_pickle=True)["x"],
    }
    for name, data in CANARIES.items():
        readers[name](io.BytesIO(data))
        assert ACTED.exists(), name
        ACTED.unlink()


def resealed(folder: Path, name: str, data: bytes) -> None:
    """The file replaced, with a manifest that agrees."""
    manifest = json.loads((folder / FOLDER_MANIFEST).read_text())
    (folder / name).write_bytes(data)
    if name != FOLDER_MANIFEST:
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_sealed_json(folder / FOLDER_MANIFEST, manifest)


def one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000


@EACH
@pytest.mark.parametrize(
    "name", ["shared.json", "shared.safetensors", "shard-00000-of-00001.safetensors", FOLDER_MANIFEST]
)
def test_checkpoint_with_a_pickle_is_refused(tmp_path: Path, name: str, canary: bytes) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": torch.zeros(3)}, {"bank": {"rows": torch.ones(2)}}, {"plan": "p"})
    resealed(next(tmp_path.glob("step-*")), name, canary)
    with pytest.raises(StopTraining) as told:
        checkpoints.read_newest()
    one_line(told)


def test_folder_of_torchs_distributed_checkpoint_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "step-00000009").mkdir()
    for name in (".metadata", "__0_0.distcp", "model.pt"):
        (tmp_path / "step-00000009" / name).write_bytes(CANARIES["pickle"])
    assert Checkpoints(tmp_path).read_newest() == (None, [])


def encoder() -> Encoder:
    return Encoder({"name": "convnet", "input": "gray", "norm": "sync", "width": 4, "depth": 2}, 8)


@EACH
@pytest.mark.parametrize("name", ["encoder.json", "encoder.safetensors", FOLDER_MANIFEST])
def test_encoder_with_a_pickle_is_refused(tmp_path: Path, name: str, canary: bytes) -> None:
    save_encoder(encoder(), tmp_path, {})
    load_encoder(tmp_path, 8)
    resealed(tmp_path, name, canary)
    with pytest.raises(UserError) as told:
        load_encoder(tmp_path, 8)
    one_line(told)


@EACH
@pytest.mark.parametrize(("load", "name"), [(load_head, "Projection"), (load_decoder, "Decoder")])
def test_head_or_decoder_with_a_pickle_is_refused(
    tmp_path: Path, load: Callable[[Path], Any], name: str, canary: bytes
) -> None:
    files = write_file(tmp_path, "network.json", json.dumps({"class": name, "spec": {}}).encode())
    write_manifest(tmp_path, {**files, **write_file(tmp_path, "network.safetensors", canary)})
    with pytest.raises(UserError) as told:
        load(tmp_path)
    one_line(told)


@EACH
@pytest.mark.parametrize("name", [IDS_FILE, VECTORS_FILE, FOLDER_MANIFEST])
def test_index_with_a_pickle_is_refused(tmp_path: Path, name: str, canary: bytes) -> None:
    save_index(tmp_path, FeatureIndex.from_features(np.arange(4), torch.eye(4)), pa.table({"id": np.arange(4)}), {})
    resealed(tmp_path, name, canary)
    with pytest.raises(UserError) as told:
        open_index(tmp_path)
    one_line(told)


def replaced(store: Store, folder: Path, data: bytes) -> Path:
    """A copy of the store with another first shard, and a manifest that agrees."""
    shutil.copytree(store.path, folder)
    raw = json.loads((folder / FOLDER_MANIFEST).read_text())
    shard = raw["shards"][0]
    (folder / shard["file"]).write_bytes(data)
    shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_sealed_json(folder / FOLDER_MANIFEST, {**raw, "hash": manifest_hash(raw)})
    return folder


@EACH
def test_shard_with_a_pickle_is_refused(tmp_path: Path, digits: Store, canary: bytes) -> None:
    store = Store.open(replaced(digits, tmp_path / "store", canary))
    store.verify()
    with pytest.raises(UserError) as told:
        store.read(np.arange(3))
    one_line(told)


@EACH
def test_store_manifest_with_a_pickle_is_refused(tmp_path: Path, digits: Store, canary: bytes) -> None:
    shutil.copytree(digits.path, tmp_path / "store")
    (tmp_path / "store" / FOLDER_MANIFEST).write_bytes(canary)
    with pytest.raises(UserError) as told:
        Store.open(tmp_path / "store")
    one_line(told)


def objects(count: int) -> pa.Array:
    """A column of the type by which Ray keeps Python objects in Arrow: as pickles."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    return ArrowPythonObjectArray.from_objects([Canary()] * count)


def parquet(**columns: Any) -> bytes:
    return _written(lambda file: pq.write_table(pa.table(columns), file))


def test_rays_column_of_objects_acts_when_it_is_read() -> None:
    pq.read_table(io.BytesIO(parquet(x=objects(1))))["x"].to_pylist()
    assert ACTED.exists()
    ACTED.unlink()


@pytest.mark.parametrize("column", ["id", "image", "label"])
def test_shard_with_a_column_of_objects_is_refused(tmp_path: Path, digits: Store, column: str) -> None:
    count = digits.shards[0].count
    columns = {"id": np.arange(count), "image": [b"x"] * count, "label": np.zeros(count, np.int64)}
    store = Store.open(replaced(digits, tmp_path / "store", parquet(**{**columns, column: objects(count)})))
    with pytest.raises(UserError, match=f"the column '{column}' has the foreign type") as told:
        store.read(np.arange(3))
    one_line(told)


@pytest.mark.parametrize("column", ["image", "label", "extra"])
def test_parquet_source_with_a_column_of_objects_is_refused(tmp_path: Path, column: str) -> None:
    columns = {"image": [b"x"] * 4, "label": ["a", "b", "a", "b"]}
    (tmp_path / "x.parquet").write_bytes(parquet(**{**columns, column: objects(4)}))
    dataset = recipes.recipe(
        tmp_path, dataset__name="x", dataset__source="parquet", dataset__root=str(tmp_path)
    ).dataset
    with pytest.raises(UserError, match=column) as told:
        open_source(dataset)
    one_line(told)


def test_list_with_a_column_of_objects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(path=objects(4)))
    dataset = recipes.recipe(
        tmp_path, dataset__name="x", dataset__source="list", dataset__list=str(tmp_path / "x.parquet")
    ).dataset
    with pytest.raises(UserError, match="path") as told:
        open_source(dataset)
    one_line(told)


def test_pickles_in_the_place_of_images_cannot_be_decoded(tmp_path: Path) -> None:
    """They are listed, with the reason; no set is left."""
    for k, canary in enumerate(CANARIES.values()):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{k}.jpg").write_bytes(canary)
    dataset = recipes.recipe(
        tmp_path, dataset__name="x", dataset__source="folder", dataset__root=str(tmp_path / "images")
    ).dataset
    with pytest.raises(UserError, match="5 of 5 images cannot be decoded") as told:
        prepare(dataset, tmp_path / "stores", lambda: False, lambda done, total: None)
    one_line(told)


@EACH
def test_pickles_in_a_search_folder_are_ignored_or_refused(tmp_path: Path, canary: bytes) -> None:
    """Ray Tune's own files are not looked at; the ledger is JSON."""
    ledger = SearchState(tmp_path, "store")
    ledger.trials = [Trial(0, {})]
    ledger.save()
    ledger.trial_folder(ledger.trials[0]).mkdir(parents=True)
    for name in ("tuner.pkl", "trainable.pkl", "searcher-state-x.pkl", f"trials/000/{OUTCOME_FILE}"):
        (tmp_path / name).write_bytes(canary)
    again = SearchState(tmp_path, "store")
    with pytest.raises(UserError) as told:
        again.load_outcome(again.trials[0])
    one_line(told)
    (tmp_path / LEDGER_FILE).write_bytes(canary)
    with pytest.raises(UserError) as told:
        SearchState(tmp_path, "store")
    one_line(told)


def test_mlflow_model_of_pickles_is_no_encoder(tmp_path: Path) -> None:
    """The folders of flavours that MLflow would unpickle are fetched, and are no encoder."""
    tracking = TrackingClient(recipes.recipe(tmp_path))
    run = tracking.client.create_run(tracking.experiment_id).info.run_id
    model = tmp_path / "encoder"
    (model / "data").mkdir(parents=True)
    flavors = {
        "python_function": {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl"},
        "pytorch": {"model_data": "data"},
    }
    (model / "MLmodel").write_text(json.dumps({"artifact_path": "encoder", "flavors": flavors, "run_id": run}))
    for name in ("python_model.pkl", "model.pkl", "data/model.pth", "encoder.safetensors", "encoder.json"):
        (model / name).write_bytes(CANARIES["torch"])
    tracking.client.log_artifacts(run, str(model), "encoder")
    fetched = fetch_reference(tracking, f"runs:/{run}/encoder", tmp_path / "fetched", "stages.finetune.encoder")
    assert (fetched / "python_model.pkl").exists()
    with pytest.raises(UserError, match="is not a whole encoder") as told:
        load_encoder(fetched, 8)
    one_line(told)


def test_store_of_these_tests_is_readable(digits: Store) -> None:
    """The store that the others were made from."""
    assert len(draw_splits(digits, recipes.recipe(Path("x")).dataset).train) > 0
    assert len(digits.read(np.arange(3))[1]) == 3
