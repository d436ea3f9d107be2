"""The data set for FiftyOne: its samples, their tags and vectors, and pictures of images without a file."""

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look.fiftyone_export import write_fiftyone_dataset
from tests.support.look_facts import make_look_facts


def read_vector(entry: dict[str, Any]) -> np.ndarray:
    """The vector of a sample, by the steps of FiftyOne's own reader."""
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(entry["$binary"]["base64"]))), allow_pickle=False)


def test_sample_has_label_tags_vector_and_picture(tmp_path: Path, digits: Store) -> None:
    facts = make_look_facts(tmp_path, digits)
    told = write_fiftyone_dataset(facts, tmp_path)
    folder = tmp_path / "fiftyone"
    assert told.startswith(f'fo.Dataset.from_dir("{folder}", dataset_type=fo.types.LegacyFiftyOneDataset)')
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert len(samples) == len(facts.ids)
    first, second, last = samples[0], samples[1], samples[-1]
    assert first["tags"] == ["train", "near duplicate", "leak"]
    assert second["tags"] == ["train", "near duplicate", "leak", "to leave out"]
    assert samples[3]["tags"][1:] == ["odd"]
    assert samples[4]["tags"][1:] == ["diverse"]
    assert last["near"] == [second["filepath"], first["filepath"]]
    label = digits.classes[digits.labels()[facts.ids[0]]]
    assert first["ground_truth"] == {"_cls": "Classification", "tags": [], "label": label}
    for sample, features in zip(samples, facts.features, strict=True):
        assert np.array_equal(read_vector(sample["embedding"]), features)
        with Image.open(folder / sample["filepath"]) as picture:
            assert picture.size == (8, 8)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata == {
        "name": tmp_path.name,
        "media_type": "image",
        "info": {"classes": {"ground_truth": list(digits.classes)}},
    }
