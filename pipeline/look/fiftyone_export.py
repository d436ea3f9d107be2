"""Images of a look as a data set on disk that FiftyOne imports: labels, splits, near duplicates and features.

FiftyOne itself is not needed to write it: the format is JSON. Its `LegacyFiftyOneDataset` has one sample for each
image, with the path of the image's own file.
"""

import base64
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.look.atlas_export import list_splits
from firstlight.pipeline.look.look_page import LookFacts
from firstlight.pipeline.look.pixel_features import ThumbnailReader

FIFTYONE_FOLDER, SAMPLES_FILE, METADATA_FILE = "fiftyone", "samples.json", "metadata.json"
DATASET_TYPE = "LegacyFiftyOneDataset"
# The tags of samples besides their split.
NEAR_TAG, LEAK_TAG, ODD_TAG, DIVERSE_TAG, REDUNDANT_TAG = "near duplicate", "leak", "odd", "diverse", "to leave out"


def write_fiftyone_dataset(facts: LookFacts, folder: Path) -> str:
    """Writes the data set into `folder`/fiftyone, and returns the line of Python that opens it.

    Images without a file of their own, or with one that only Firstlight shows, get a thumbnail there. `near` has the
    paths of an image's near duplicates, and `original` that of its own file.
    """
    target = folder / FIFTYONE_FOLDER
    (target / "data").mkdir(parents=True, exist_ok=True)
    paths = _find_files(facts, target)
    near = defaultdict[int, list[int]](list)
    for pair in facts.findings.near_duplicates:
        near[pair.first].append(pair.second)
        near[pair.second].append(pair.first)
    tags = _collect_tags(facts)
    samples = []
    for image_id, split, features in zip(facts.ids.tolist(), list_splits(facts), facts.features, strict=True):
        label = facts.lister.rows[image_id][1]
        samples.append(
            {
                "filepath": paths[image_id],
                "tags": [split, *tags[image_id]],
                "ground_truth": {"_cls": "Classification", "tags": [], "label": label} if label else None,
                "store_id": image_id,
                "original": facts.lister.rows[image_id][0] or None,
                "embedding": _encode_vector(features),
                "near": [paths[other] for other in near[image_id]],
            }
        )
    info = {"classes": {"ground_truth": list(facts.store.classes)}} if facts.store.classes else {}
    name = facts.data.resolve().name
    write_atomically(target / METADATA_FILE, json.dumps({"name": name, "media_type": "image", "info": info}).encode())
    write_atomically(target / SAMPLES_FILE, json.dumps({"samples": samples}).encode())
    return f'fo.Dataset.from_dir("{target}", dataset_type=fo.types.{DATASET_TYPE}), after import fiftyone as fo'


def _find_files(facts: LookFacts, target: Path) -> dict[int, str]:
    """Returns the path of each image: its own file, or one in the data set, relative to it."""
    own = {image_id: facts.lister.rows[image_id][0] for image_id in facts.ids.tolist()}
    is_shown = facts.store.stated_pixels is None
    missing = np.array([image_id for image_id, path in own.items() if not path or not is_shown], np.int64)
    for image_id, data in ThumbnailReader(facts.store).read_files(missing).items():
        own[image_id] = f"data/{image_id}.jpg"
        write_atomically(target / own[image_id], data)
    return own


def _collect_tags(facts: LookFacts) -> Mapping[int, list[str]]:
    found, tagged = facts.findings, defaultdict[int, list[str]](list)
    for tag, ids in (
        (NEAR_TAG, {one for pair in found.near_duplicates for one in (pair.first, pair.second)}),
        (LEAK_TAG, {one for pair in found.leaks for one in (pair.first, pair.second)}),
        (REDUNDANT_TAG, found.redundant),
        (ODD_TAG, {image_id for image_id, _ in found.odd}),
        (DIVERSE_TAG, set(found.diverse)),
    ):
        for image_id in ids:
            tagged[image_id].append(tag)
    return tagged


def _encode_vector(features: np.ndarray) -> dict[str, Any]:
    """Returns (d,) numbers as FiftyOne keeps a vector in JSON: a compressed .npy file."""
    file = io.BytesIO()
    np.save(file, features.astype(np.float32), allow_pickle=False)
    return {"$binary": {"base64": base64.b64encode(zlib.compress(file.getvalue())).decode(), "subType": "00"}}
