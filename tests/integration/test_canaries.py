"""Files that act when they are unpickled, in the place of every artifact that is read: each is refused in a line, and does not act."""

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

from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.data.splits import split
from firstlight.pipeline.data.store import Store, manifest_hash
from firstlight.pipeline.errors import StopTraining, UserError
from firstlight.pipeline.search.ledger import LEDGER, OUTCOME, Ledger, Trial
from firstlight.pipeline.stages.artifacts import load_decoder, load_encoder, load_head, save_encoder
from firstlight.pipeline.stages.retrieve import IDS, VECTORS, Index, open_index, save_index
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.train.checkpoint import MANIFEST, Checkpoints, put, seal
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes

ACTED = Path("/tmp/firstlight-canary-acted")


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
def _none_acts() -> Iterator[None]:
    ACTED.unlink(missing_ok=True)
    yield
    assert not ACTED.exists()


def test_each_acts_where_it_is_unpickled() -> None:
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
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / name).write_bytes(data)
    if name != MANIFEST:
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / MANIFEST).write_text(json.dumps(manifest))


def one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000


@EACH
@pytest.mark.parametrize("name", ["shared.json", "shared.safetensors", "shard-00000-of-00001.safetensors", MANIFEST])
def test_a_checkpoint(tmp_path: Path, name: str, canary: bytes) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": torch.zeros(3)}, {"bank": {"rows": torch.ones(2)}}, {"plan": "p"})
    resealed(next(tmp_path.glob("step-*")), name, canary)
    with pytest.raises(StopTraining) as told:
        checkpoints.newest()
    one_line(told)


def test_a_folder_of_torchs_distributed_checkpoints_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-00000009").mkdir()
    for name in (".metadata", "__0_0.distcp", "model.pt"):
        (tmp_path / "step-00000009" / name).write_bytes(CANARIES["pickle"])
    assert Checkpoints(tmp_path).newest() == (None, [])


def encoder() -> Encoder:
    return Encoder({"name": "convnet", "input": "gray", "norm": "sync", "width": 4, "depth": 2}, 8)


@EACH
@pytest.mark.parametrize("name", ["encoder.json", "encoder.safetensors", MANIFEST])
def test_an_encoder(tmp_path: Path, name: str, canary: bytes) -> None:
    save_encoder(encoder(), tmp_path, {})
    load_encoder(tmp_path, 8)
    resealed(tmp_path, name, canary)
    with pytest.raises(UserError) as told:
        load_encoder(tmp_path, 8)
    one_line(told)


@EACH
@pytest.mark.parametrize(("load", "name"), [(load_head, "Projection"), (load_decoder, "Decoder")])
def test_another_network(tmp_path: Path, load: Callable[[Path], Any], name: str, canary: bytes) -> None:
    files = put(tmp_path, "network.json", json.dumps({"class": name, "spec": {}}).encode())
    seal(tmp_path, {**files, **put(tmp_path, "network.safetensors", canary)})
    with pytest.raises(UserError) as told:
        load(tmp_path)
    one_line(told)


@EACH
@pytest.mark.parametrize("name", [IDS, VECTORS, MANIFEST])
def test_an_index(tmp_path: Path, name: str, canary: bytes) -> None:
    save_index(tmp_path, Index.of(np.arange(4), torch.eye(4)), pa.table({"id": np.arange(4)}), {})
    resealed(tmp_path, name, canary)
    with pytest.raises(UserError) as told:
        open_index(tmp_path)
    one_line(told)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return recipes.store(tmp_path_factory.mktemp("digits"))


def replaced(store: Store, folder: Path, data: bytes) -> Path:
    """A copy of the store with another first shard, and a manifest that agrees."""
    shutil.copytree(store.path, folder)
    raw = json.loads((folder / MANIFEST).read_text())
    shard = raw["shards"][0]
    (folder / shard["file"]).write_bytes(data)
    shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / MANIFEST).write_text(json.dumps({**raw, "hash": manifest_hash(raw)}))
    return folder


@EACH
def test_a_shard_of_a_store(tmp_path: Path, digits: Store, canary: bytes) -> None:
    store = Store.open(replaced(digits, tmp_path / "store", canary))
    store.verify()
    with pytest.raises(UserError) as told:
        store.read(np.arange(3))
    one_line(told)


@EACH
def test_the_manifest_of_a_store(tmp_path: Path, digits: Store, canary: bytes) -> None:
    shutil.copytree(digits.path, tmp_path / "store")
    (tmp_path / "store" / MANIFEST).write_bytes(canary)
    with pytest.raises(UserError) as told:
        Store.open(tmp_path / "store")
    one_line(told)


def objects(count: int) -> pa.Array:
    """A column of the type by which Ray keeps Python objects in Arrow: as pickles."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    return ArrowPythonObjectArray.from_objects([Canary()] * count)


def parquet(**columns: Any) -> bytes:
    return _written(lambda file: pq.write_table(pa.table(columns), file))


def test_rays_column_of_objects_acts_where_it_is_looked_at() -> None:
    pq.read_table(io.BytesIO(parquet(x=objects(1))))["x"].to_pylist()
    assert ACTED.exists()
    ACTED.unlink()


@pytest.mark.parametrize("column", ["id", "image", "label"])
def test_a_shard_with_a_column_of_objects(tmp_path: Path, digits: Store, column: str) -> None:
    count = digits.shards[0].count
    columns = {"id": np.arange(count), "image": [b"x"] * count, "label": np.zeros(count, np.int64)}
    store = Store.open(replaced(digits, tmp_path / "store", parquet(**{**columns, column: objects(count)})))
    with pytest.raises(UserError, match=f"the column '{column}' has the foreign type") as told:
        store.read(np.arange(3))
    one_line(told)


@pytest.mark.parametrize("column", ["image", "label", "extra"])
def test_a_parquet_source_with_a_column_of_objects(tmp_path: Path, column: str) -> None:
    columns = {"image": [b"x"] * 4, "label": ["a", "b", "a", "b"]}
    (tmp_path / "x.parquet").write_bytes(parquet(**{**columns, column: objects(4)}))
    dataset = recipes.recipe(
        tmp_path, dataset__name="x", dataset__source="parquet", dataset__root=str(tmp_path)
    ).dataset
    with pytest.raises(UserError, match=column) as told:
        open_source(dataset)
    one_line(told)


def test_a_list_with_a_column_of_objects(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(path=objects(4)))
    dataset = recipes.recipe(
        tmp_path, dataset__name="x", dataset__source="list", dataset__list=str(tmp_path / "x.parquet")
    ).dataset
    with pytest.raises(UserError, match="path") as told:
        open_source(dataset)
    one_line(told)


def test_images_that_are_none(tmp_path: Path) -> None:
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
def test_a_search(tmp_path: Path, canary: bytes) -> None:
    """Ray Tune's own files are not looked at; the ledger is JSON."""
    ledger = Ledger(tmp_path, "store")
    ledger.trials = [Trial(0, {})]
    ledger.save()
    ledger.place(ledger.trials[0]).mkdir(parents=True)
    for name in ("tuner.pkl", "trainable.pkl", "searcher-state-x.pkl", f"trials/000/{OUTCOME}"):
        (tmp_path / name).write_bytes(canary)
    again = Ledger(tmp_path, "store")
    assert not again.absorb(again.trials[0])
    (tmp_path / LEDGER).write_bytes(canary)
    with pytest.raises(UserError) as told:
        Ledger(tmp_path, "store")
    one_line(told)


def test_models_of_mlflow(tmp_path: Path) -> None:
    """Of the flavours that MLflow would unpickle: their folders are fetched, and are no encoder."""
    tracking = Tracking(recipes.recipe(tmp_path))
    run = tracking.client.create_run(tracking.experiment).info.run_id
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
    fetched = tracking.fetch(f"runs:/{run}/encoder", tmp_path / "fetched", "stages.finetune.encoder")
    assert (fetched / "python_model.pkl").exists()
    with pytest.raises(UserError, match="is not a whole encoder") as told:
        load_encoder(fetched, 8)
    one_line(told)


def test_what_remains_readable(digits: Store) -> None:
    """The store that the others were made from."""
    assert len(split(digits, recipes.recipe(Path("x")).dataset).train) > 0
    assert len(digits.read(np.arange(3))[1]) == 3
