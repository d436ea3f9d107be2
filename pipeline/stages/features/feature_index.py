"""An index of features on disk, and the images nearest to a query.

index/index.faiss    unit vectors, searched by inner product, that is by cosine (faiss, IndexFlatIP: exact)
index/ids.parquet    id, path and label (-1: unknown) of each vector, in their order
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

from firstlight.pipeline.data.parquet import read_parquet_table
from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.train.folder_manifest import DamagedFileError, read_verified, write_file, write_manifest

INDEX_FOLDER, VECTORS_FILE, IDS_FILE = "index", "index.faiss", "ids.parquet"


@dataclass(frozen=True)
class FeatureIndex:
    """Feature vectors of images, ready to be searched."""

    ids: np.ndarray  # (n,) int64
    vectors: Any  # a faiss index of n unit vectors

    @staticmethod
    def from_features(ids: np.ndarray, features: Tensor) -> "FeatureIndex":
        """Builds an index of (n,) ids and their (n, d) features, which need not be unit vectors."""
        vectors = import_faiss().IndexFlatIP(features.shape[1])
        vectors.add(_to_unit_vectors(features))
        return FeatureIndex(ids, vectors)

    def search(self, features: Tensor | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (m, k) ids of the images nearest to (m, d) features, and their (m, k) cosines in descending order.

        Equal cosines are in the order of the ids. The id is -1 where k exceeds the number of images.
        """
        import_faiss()
        cosines, places = self.vectors.search(_to_unit_vectors(features), k)
        ids = np.where(places < 0, -1, self.ids[places])
        order = np.lexsort((ids, -cosines))
        return np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)


def _to_unit_vectors(features: Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(torch.as_tensor(features).float(), dim=1).cpu().numpy())


def import_faiss() -> Any:
    """Imports faiss and gives it as many threads as torch has; it takes all cores otherwise."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def save_index(folder: Path, index: FeatureIndex, rows: pa.Table, facts: dict[str, Any]) -> None:
    """Writes an index with the (n) rows of its images. `facts` are kept in the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    pq.write_table(rows, file, write_page_checksum=True)
    files = write_file(folder, IDS_FILE, file.getvalue())
    files |= write_file(folder, VECTORS_FILE, import_faiss().serialize_index(index.vectors).tobytes())
    write_manifest(folder, files, format=1, count=len(index.ids), dimensions=int(index.vectors.d), **facts)


def open_index(folder: Path) -> FeatureIndex:
    """Opens the index of a finished stage.

    No pickle is read, but faiss's reader is not hardened. Checksums show damage, not intent, so open only what your own
    runs have written.

    Raises:
        UserError: a file is missing, damaged, or not an index's; the message names it.
    """
    try:
        manifest, files = read_verified(folder)
        ids = read_parquet_table(io.BytesIO(files[IDS_FILE]), ["id"]).column("id").to_numpy()
        vectors = import_faiss().deserialize_index(np.frombuffer(files[VECTORS_FILE], np.uint8))
        if not len(ids) == vectors.ntotal == manifest["count"]:
            raise ValueError(f"{len(ids)} ids, {vectors.ntotal} vectors, the manifest says {manifest['count']}")
    except (DamagedFileError, KeyError, ValueError, TypeError, RuntimeError, pa.ArrowException) as error:
        raise UserError(f"{folder}: is not a whole index: {one_line(error)}") from None
    return FeatureIndex(ids, vectors)
