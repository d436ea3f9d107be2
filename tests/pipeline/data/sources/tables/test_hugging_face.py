"""Data sets on a hub become stores, which keep the commit."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.errors import UserError
from tests.support.dataset_hub import COMMIT, OTHER_COMMIT, DatasetHub, serve_datasets
from tests.support.image_sources import dataset_options, prepare_store, read_split
from tests.support.saved_datasets import CLASS_NAMES, make_dataset, make_images

TRAIN, TEST = make_images(8), make_images(3, 20)


def write_parquet(images: list[bytes], labels: list[int]) -> bytes:
    """Returns a file as push_to_hub writes it."""
    buffer = io.BytesIO()
    make_dataset(images, labels).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    with serve_datasets(monkeypatch) as served:
        files = {
            "data/train-00000-of-00001.parquet": write_parquet(TRAIN, [0, 1, 2, 0, 1, 2, 0, 1]),
            "data/test-00000-of-00001.parquet": write_parquet(TEST, [2, 1, 0]),
            "photos.py": b"raise SystemExit('executed')",
        }
        served.files = {COMMIT: files, OTHER_COMMIT: {"photos.py": b""}}
        yield served


def test_data_set_is_read_as_the_commit_has_it(hub: DatasetHub, tmp_path: Path) -> None:
    source = open_source(dataset_options(source="hugging_face", root="hf://owner/photos"))
    hub.revisions["main"] = OTHER_COMMIT
    assert source.classes == tuple(CLASS_NAMES)
    assert [record.data for record in read_split(source)] == TRAIN
    assert [(record.data, record.label) for record in read_split(source, "test")] == list(
        zip(TEST, [2, 1, 0], strict=True)
    )
    assert source.reading[0] == f"read commit {COMMIT} of hf://owner/photos"
    assert not [line for line in hub.requests if "photos.py" in line]


def test_store_keeps_the_commit(hub: DatasetHub, tmp_path: Path) -> None:
    root = f"hf://owner/photos@{COMMIT}?split=train"
    store = prepare_store(dataset_options(source="hugging_face", root=root, test_fraction=0.25), tmp_path)
    assert store.source["kind"] == "hugging_face"
    assert store.source["root"] == root
    assert COMMIT in store.source["reading"][0]
    assert sum(store.splits.values()) == len(TRAIN)


def test_files_in_the_cache_are_read_without_a_hub(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    options = dataset_options(source="hugging_face", root="hf://owner/photos")
    online = open_source(options)
    snapshot_download("owner/photos", repo_type="dataset", cache_dir=tmp_path)
    hub.shutdown()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = open_source(options)
    assert offline.reading[0] == online.reading[0]
    assert [record.data for record in read_split(offline)] == TRAIN
    other = dataset_options(source="hugging_face", root="hf://owner/others")
    with pytest.raises(UserError, match=r"is not in the cache, and HF_HUB_OFFLINE is set; hf download"):
        open_source(other)


def test_data_set_without_parquet_files_is_named(hub: DatasetHub) -> None:
    with pytest.raises(UserError, match=r"has no Parquet files; valid: hf://owner/photos@refs/convert/parquet"):
        open_source(dataset_options(source="hugging_face", root="hf://owner/photos@old"))


def test_other_sources_do_not_take_a_hub() -> None:
    with pytest.raises(UserError, match=r"valid: dataset\.source=hugging_face$"):
        open_source(dataset_options(source="parquet", root="hf://owner/photos"))
