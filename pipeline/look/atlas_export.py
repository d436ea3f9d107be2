"""Images of a look as a Parquet file that `embedding-atlas` opens: pictures, labels, places on a plane, neighbours."""

import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.files import atomic_path
from firstlight.pipeline.look.findings import find_neighbours
from firstlight.pipeline.look.look_page import LookFacts
from firstlight.pipeline.look.pixel_features import ThumbnailReader
from firstlight.pipeline.stages.features.projection import MapProjection, project_to_plane

ATLAS_FILE = "embedding_atlas.parquet"
# The largest number of images for t-SNE, which would take minutes for more: these are placed by their first two
# principal components.
MAX_TSNE_IMAGES = 5_000
# Neighbours are rows of the file, from 0, with the distances 1 - cosine.
NEIGHBOURS = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
# An encoded image and the path that it had, as in data sets of Hugging Face.
ENCODED_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ATLAS_SCHEMA = pa.schema(
    [
        *(("id", pa.int64()), ("path", pa.string()), ("image", ENCODED_IMAGE)),
        *(("label", pa.string()), ("split", pa.string()), ("x", pa.float32()), ("y", pa.float32())),
        *(("neighbors", NEIGHBOURS), ("near_duplicates", pa.int64()), ("leak", pa.bool_())),
        ("embedding", pa.list_(pa.float32())),
    ]
)


def write_atlas_table(facts: LookFacts, folder: Path) -> str:
    """Writes the file, and returns the command that opens it.

    A row is an image, in the order of the ids. `near_duplicates` is the number of images that are near it, and `leak`
    is true if one of them is to train on and the other is not.
    """
    how: MapProjection = "tsne" if len(facts.ids) <= MAX_TSNE_IMAGES else "pca"
    places, _ = project_to_plane(facts.features, how)
    rows = [facts.lister.rows[image_id] for image_id in facts.ids.tolist()]
    thumbnails = ThumbnailReader(facts.store).read_files(facts.ids)
    pairs = facts.findings.near_duplicates
    copies = Counter(one for pair in pairs for one in (pair.first, pair.second))
    leaks = {one for pair in facts.findings.leaks for one in (pair.first, pair.second)}
    ids = facts.ids.tolist()
    columns = {
        "id": ids,
        "path": [path or None for path, _ in rows],
        "image": [
            {"bytes": thumbnails[image_id], "path": path or None} for image_id, (path, _) in zip(ids, rows, strict=True)
        ],
        "label": [label or None for _, label in rows],
        "split": list_splits(facts),
        "x": places[:, 0].astype(np.float32),
        "y": places[:, 1].astype(np.float32),
        "neighbors": _list_neighbours(facts),
        "near_duplicates": [copies[image_id] for image_id in ids],
        "leak": [image_id in leaks for image_id in ids],
        "embedding": list(facts.features.astype(np.float32)),
    }
    file = folder / ATLAS_FILE
    with atomic_path(file) as unfinished:
        pq.write_table(pa.table(columns, schema=ATLAS_SCHEMA), unfinished)
    return f"embedding-atlas {shlex.quote(str(file))} --x x --y y --neighbors neighbors --image image"


def list_splits(facts: LookFacts) -> list[str]:
    """Returns the split of each image of a look."""
    split_of = {image_id: split for split in facts.store.splits for image_id in facts.store.ids(split).tolist()}
    return [split_of[image_id] for image_id in facts.ids.tolist()]


def _list_neighbours(facts: LookFacts) -> list[dict[str, np.ndarray]]:
    near, cosines = find_neighbours(facts.ids, facts.features)
    rows = np.searchsorted(facts.ids, near)
    distances = np.clip(1.0 - cosines, 0.0, None).astype(np.float32)
    return [{"ids": its, "distances": how_far} for its, how_far in zip(rows, distances, strict=True)]
