"""Stage: which images are nearest to a query? An index of a gallery's features on disk, and how many of those found are of the query's class.

index/index.faiss    unit vectors, searched by inner product, that is by cosine (faiss, IndexFlatIP: exact)
index/ids.parquet    id, path, label (-1: unknown) of each vector, in their order
index/manifest.json  sizes and sha256 of both, and what the vectors are of; written last
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.pipeline.config.recipe import Retrieve
from firstlight.pipeline.data.parquet import parquet_table
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_json
from firstlight.pipeline.report import neighbours
from firstlight.pipeline.stages.frozen_features import ARMS, arms, sweep
from firstlight.pipeline.stages.stage import RESULT, Instance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.train.checkpoint import Damaged, put, seal, verified
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.metrics import METRICS
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream.retrieval import mean_average_precision, precision, without_own

INDEX, VECTORS, IDS = "index", "index.faiss", "ids.parquet"
LOGGED_BYTES = 100_000_000  # a larger index stays where it is; MLflow gets its manifest


@dataclass(frozen=True)
class Index:
    """Vectors of images, to be searched."""

    ids: np.ndarray  # (n,) int64
    vectors: Any  # a faiss index of n unit vectors

    @staticmethod
    def of(ids: np.ndarray, features: Tensor) -> "Index":
        """(n,) ids and their (n, d) features, of any length."""
        vectors = _faiss().IndexFlatIP(features.shape[1])
        vectors.add(_unit(features))
        return Index(ids, vectors)

    def search(self, features: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(m, d) -> (m, k) ids of the nearest images and their (m, k) cosines, falling, of equal ones the lowest id first; id -1 beyond n."""
        _faiss()
        cosines, places = self.vectors.search(_unit(features), k)
        ids = np.where(places < 0, -1, self.ids[places])
        order = np.lexsort((ids, -cosines))
        return np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)


def _unit(features: Tensor) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(features.float(), dim=1).cpu().numpy())


def _faiss() -> Any:
    """With the threads that torch has: it takes all cores otherwise."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def save_index(folder: Path, index: Index, rows: pa.Table, facts: dict[str, Any]) -> None:
    """Write the index with the (n) rows of its images. `facts` are kept in the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    pq.write_table(rows, file, write_page_checksum=True)
    files = put(folder, IDS, file.getvalue())
    files |= put(folder, VECTORS, _faiss().serialize_index(index.vectors).tobytes())
    seal(folder, files, format=1, count=len(index.ids), dimensions=int(index.vectors.d), **facts)


def open_index(folder: Path) -> Index:
    """The index that a stage has left.

    No pickle, but faiss's reader is not hardened: sums show damage, not intent, so open only what your own runs have written.

    Raises:
        UserError: a file is missing, damaged, or not an index's; names it.
    """
    try:
        manifest, files = verified(folder)
        ids = parquet_table(io.BytesIO(files[IDS]), ["id"]).column("id").to_numpy()
        vectors = _faiss().deserialize_index(np.frombuffer(files[VECTORS], np.uint8))
        if not len(ids) == vectors.ntotal == manifest["count"]:
            raise ValueError(f"{len(ids)} ids, {vectors.ntotal} vectors, the manifest says {manifest['count']}")
    except (Damaged, KeyError, ValueError, TypeError, RuntimeError, pa.ArrowException) as error:
        raise UserError(f"{folder}: is not a whole index: {' '.join(str(error).split())[:200]}") from None
    return Index(ids, vectors)


def nearest(folder: Path, features: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(m, d) features -> (m, k) ids of the images of a saved index that are nearest, and their cosines, as `Index.search`.

    Raises:
        UserError: as `open_index`; or the features are not those of the index.
    """
    index = open_index(folder)
    if features.shape[1] != index.vectors.d:
        raise UserError(f"{folder}: holds vectors of {index.vectors.d} dimensions, asked was for {features.shape[1]}")
    return index.search(features, k)


def gallery(stage: Retrieve, splits: Splits) -> np.ndarray:
    """The sorted ids that are searched."""
    return {
        "train": splits.train,
        "test": splits.test,
        "all": np.sort(np.concatenate((splits.train, splits.val, splits.test))),
    }[stage.gallery]


def queries(stage: Retrieve, splits: Splits) -> np.ndarray:
    return splits.val if stage.queries == "val" else splits.test


def work(worker: Worker, stage: Retrieve, instance: Instance) -> None:
    """Leave `index/` of the pretrained features and `result.json` in the instance's folder. Runs on every worker; the search is on rank 0."""
    searched, asked = gallery(stage, worker.splits), queries(stage, worker.splits)
    ids = np.union1d(searched, asked)
    swept = sweep(worker, arms(worker, stage, instance), ids, instance, stage.batch_size)
    if rank() == 0:
        result: dict[str, Any] = {"gallery": len(searched), "queries": len(asked)}
        for arm, (features,) in swept.items():
            index = Index.of(searched, features[np.searchsorted(ids, searched)])
            if arm == "pretrained":
                _keep(worker, stage, instance, index)
            result[arm] = _measured(stage, index, (asked, features[np.searchsorted(ids, asked)]), worker.splits.labels)
        write_json(instance.folder / RESULT, result)
    barrier()


def _keep(worker: Worker, stage: Retrieve, instance: Instance, index: Index) -> None:
    columns = {"id": index.ids, "path": worker.store.paths(index.ids), "label": worker.splits.labels[index.ids]}
    looked = {
        key: value
        for key, value in stage.model_dump(mode="json").items()
        if key in ("features", "layer", "pool", "gallery")
    }
    save_index(
        instance.folder / INDEX, index, pa.table(columns), {**looked, "store": worker.store.hash, "seed": instance.seed}
    )


def _measured(stage: Retrieve, index: Index, asked: tuple[np.ndarray, Tensor], labels: np.ndarray) -> dict[str, Any]:
    """What the (ids, features) of the queries find; where there are labels, how much of it is right."""
    ids, features = asked
    few = neighbours.queries(ids, labels)
    shown = _found(index, (ids[few], features[few]), neighbours.SHOWN)
    out: dict[str, Any] = {
        "shown": [[query, row] for query, row in zip(ids[few].tolist(), shown.tolist(), strict=True)]
    }
    known, answered = labels[index.ids] >= 0, labels[ids] >= 0
    if not known.any() or not answered.any():
        return out
    labelled = (
        index
        if known.all()
        else Index.of(index.ids[known], torch.from_numpy(index.vectors.reconstruct_n(0, len(known))[known]))
    )
    found = _found(labelled, (ids[answered], features[torch.from_numpy(answered)]), max(stage.precision_at))
    classes = torch.from_numpy(labels[ids[answered]])
    right = torch.from_numpy(labels[found]) == classes[:, None]
    of_class = torch.from_numpy(np.bincount(labels[labelled.ids], minlength=int(labels.max()) + 1))
    relevant = of_class[classes] - torch.from_numpy(np.isin(ids[answered], labelled.ids)).long()
    by_k = {str(k): value for k, value in precision(right, stage.precision_at).items()}
    return {**out, "precision": by_k, "mean_average_precision": mean_average_precision(right, relevant)}


def _found(index: Index, asked: tuple[np.ndarray, Tensor], k: int) -> np.ndarray:
    """(m, k) ids, never the query's own."""
    ids, features = asked
    return without_own(torch.from_numpy(index.search(features, k + 1)[0]), torch.from_numpy(ids)).numpy()


def files(stage: Retrieve, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / METRICS, instance.label, "")]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Retrieve, instance: Instance) -> None:
    """Scores, pictures and the index into the MLflow run. Runs on the driver."""
    result, folder, client = instance.result, instance.folder / INDEX, tracking.client
    assert result is not None
    album = Album(tracking, run_id, instance.folder)
    for arm in ARMS:
        if "precision" in result[arm]:
            scores = {f"precision_at_{k}": value for k, value in result[arm]["precision"].items()}
            tracking.numbers(
                run_id, scores | {"mean_average_precision": result[arm]["mean_average_precision"]}, f"{arm}/"
            )
        told = f"{arm}: the nearest images to the query at the left; those of another class in red"
        album.add(f"neighbours_{arm}", neighbours.picture(worker, result[arm]["shown"], told), told)
    if sum(file.stat().st_size for file in folder.iterdir()) <= LOGGED_BYTES:
        client.log_artifacts(run_id, str(folder), INDEX)
    else:
        client.log_artifact(run_id, str(folder / "manifest.json"), INDEX)
