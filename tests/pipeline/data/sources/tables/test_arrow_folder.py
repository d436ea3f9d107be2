"""Folders that `save_to_disk` of the library datasets has written."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, prepare_store, read_split
from tests.support.saved_datasets import CLASS_NAMES, make_dataset, make_images

datasets = pytest.importorskip("datasets")


def save_splits(folder: Path) -> dict[str, list[bytes]]:
    """Saves three splits, the first in two files, and returns the images of each."""
    images = {"train": make_images(7), "validation": make_images(3, 10), "unsupervised": make_images(2, 20)}
    labels = {"train": [2, 0, 1, 0, 1, 2, 0], "validation": [1, 1, 0], "unsupervised": [-1, -1]}
    found = {split: make_dataset(images[split], labels[split]) for split in images}
    datasets.DatasetDict(found).save_to_disk(folder, num_shards={"train": 2, "validation": 1, "unsupervised": 1})
    return images


def test_splits_are_read_with_their_bytes_and_class_names(tmp_path: Path) -> None:
    images = save_splits(tmp_path / "set")
    source = pickle.loads(pickle.dumps(open_source(dataset_options(source="hugging_face", root=tmp_path / "set"))))
    assert source.classes == tuple(CLASS_NAMES)
    assert source.splits == {"train": 7, "val": 3}
    found = [(record.data, record.label) for record in read_split(source)]
    assert found == list(zip(images["train"], [2, 0, 1, 0, 1, 2, 0], strict=True))
    held_out = read_split(source, "val")
    assert [record.data for record in held_out] == images["validation"]
    assert held_out[0].path == "validation/data-00000-of-00001.arrow#0 0.png"
    assert any("unsupervised" in note for note in source.notes)


def test_single_data_set_without_labels_becomes_a_store(tmp_path: Path) -> None:
    images = make_images(12)
    make_dataset(images).save_to_disk(tmp_path / "set")
    options = dataset_options(source="hugging_face", root=tmp_path / "set", label_column=None, test_fraction=0.25)
    store = prepare_store(options, tmp_path / "stores")
    assert store.splits == {"train": 9, "test": 3}
    assert store.source["kind"] == "hugging_face"


def test_rows_are_read_from_the_middle_of_a_file(tmp_path: Path) -> None:
    images = make_images(50)
    make_dataset(images).save_to_disk(tmp_path / "set")
    options = dataset_options(source="hugging_face", root=tmp_path / "set", label_column=None, test_fraction=0.0)
    source = open_source(options)
    parts = source.split_into_parts(7)
    assert [record.data for part in reversed(parts) for record in source.read(part)] == [
        data for part in reversed(parts) for data in images[part.start : part.start + part.count]
    ]


def test_folder_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"^dataset\.root: .*has no dataset_dict\.json or state\.json; valid: hf://"):
        open_source(dataset_options(source="hugging_face", root=tmp_path / "set"))


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("{", "is damaged"),
        ("[]", "no object of JSON"),
        ('{"_data_files": []}', "names no files"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "is no name of a file in this folder"),
        ('{"_data_files": [{"filename": "a"}], "_indices_files": [{"filename": "b"}]}', r"flatten_indices\(\)"),
    ],
)
def test_damaged_state_is_named(tmp_path: Path, state: str, problem: str) -> None:
    make_dataset(make_images(2)).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(UserError, match=problem) as error:
        open_source(dataset_options(source="hugging_face", root=tmp_path / "set"))
    assert str(tmp_path / "set" / "state.json") in str(error.value)


def test_torn_file_is_named(tmp_path: Path) -> None:
    make_dataset(make_images(20)).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"\.arrow: cannot be read as Arrow"):
        open_source(dataset_options(source="hugging_face", root=tmp_path / "set", label_column=None))


def test_file_that_changes_after_its_listing_costs_its_rows_alone(tmp_path: Path) -> None:
    make_dataset(make_images(20)).save_to_disk(tmp_path / "set")
    options = dataset_options(source="hugging_face", root=tmp_path / "set", label_column=None, test_fraction=0.0)
    source = open_source(options)
    make_dataset(make_images(5)).save_to_disk(tmp_path / "short")
    (file,) = (tmp_path / "set").glob("*.arrow")
    (short,) = (tmp_path / "short").glob("*.arrow")
    file.unlink()
    short.rename(file)
    records = read_split(source)
    assert [record.data is None for record in records] == [False] * 5 + [True] * 15
    assert "it has fewer rows than when it was listed" in str(records[-1].reason)
    file.write_bytes(b"no arrow")
    assert all(record.reason for record in read_split(source))


class PickledType(pa.ExtensionType):
    """A type whose values would be unpickled, as Ray has one."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "tests.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "PickledType":
        return cls()


def test_column_of_a_foreign_type_is_refused(tmp_path: Path) -> None:
    make_dataset(make_images(2)).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    kind = PickledType()
    pa.register_extension_type(kind)
    try:
        values = pa.ExtensionArray.from_storage(kind, pa.array([b"cos\nsystem\n"]))
        table = pa.table({"image": pa.array([b"x"]), "other": values})
        file.unlink()
        with pa.OSFile(str(file), "wb") as target, pa.ipc.new_stream(target, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match=r"the column 'other' has the foreign type tests\.pickled"):
            open_source(dataset_options(source="hugging_face", root=tmp_path / "set", label_column=None))
    finally:
        pa.unregister_extension_type("tests.pickled")


def test_description_of_a_folder_is_never_executed(tmp_path: Path) -> None:
    """A loading script and a pickle beside the files are not looked at."""
    save_splits(tmp_path / "set")
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('executed')")
    (tmp_path / "set" / "train" / "cache.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    state = json.loads((tmp_path / "set" / "train" / "state.json").read_text())
    assert state["_data_files"]
    assert open_source(dataset_options(source="hugging_face", root=tmp_path / "set")).splits["val"] == 3
