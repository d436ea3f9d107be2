"""The binary version of CIFAR: order of planes, labels, cut files, and pickles that are refused."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources import SourcePart
from tests.support.image_sources import dataset_options, list_labels, read_split
from tests.support.layouts import cifar_rows
from tests.support.published_sets import decode_split, get_refusal, noise, open_set

NAMES10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture
def ten(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Two images a batch; (12, 32, 32, 3) and (12,)."""
    images, labels = noise(0, 12, 32, 32, 3), np.arange(12) * 3 % 10
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k, name in enumerate(BATCHES):
        (folder / name).write_bytes(cifar_rows(images[2 * k : 2 * k + 2], labels[2 * k : 2 * k + 2]))
    (folder / "batches.meta.txt").write_text("\n".join(NAMES10) + "\n\n")
    return tmp_path, images, labels


def write_cifar100(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three to train on, one to test on; images, coarse labels, fine labels."""
    images, coarse, fine = noise(1, 4, 32, 32, 3), np.array([0, 1, 1, 0]), np.array([2, 0, 1, 2])
    for name, part in (("train.bin", slice(0, 3)), ("test.bin", slice(3, 4))):
        (root / name).write_bytes(cifar_rows(images[part], coarse[part], fine[part]))
    (root / "fine_label_names.txt").write_text("apple\nbee\ncup\n")
    (root / "coarse_label_names.txt").write_text("food\nother\n")
    return images, coarse, fine


def test_cifar10_pixels_labels_and_splits_are_read(ten: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, images, labels = ten
    source = open_set("cifar10", root)
    assert (source.classes, source.splits, source.kind) == (NAMES10, {"train": 10, "test": 2}, "cifar10")
    np.testing.assert_array_equal(decode_split(source), images[:10])
    np.testing.assert_array_equal(decode_split(source, "test"), images[10:])
    assert [record.label for record in read_split(source)] == labels[:10].tolist()
    assert [label for _, label in list_labels(source, "test")] == labels[10:].tolist()
    assert [path for path, _ in list_labels(source)][:3] == [
        "data_batch_1.bin#0",
        "data_batch_1.bin#1",
        "data_batch_2.bin#0",
    ]
    assert all((record.data or b"").startswith(b"\x89PNG") for record in read_split(source))


def test_parts_cross_files_and_pickle_small(ten: tuple[Path, np.ndarray, np.ndarray]) -> None:
    source = open_set("cifar10", ten[0] / "cifar-10-batches-bin")
    there = pickle.loads(pickle.dumps(source))
    assert [record for part in source.split_into_parts(3) for record in there.read(part)] == read_split(
        source
    ) + read_split(source, "test")
    assert [record.path for record in source.read(SourcePart("train", 3, 2))] == [
        "data_batch_2.bin#1",
        "data_batch_3.bin#0",
    ]
    assert len(pickle.dumps(source)) < 4000


def test_cifar100_label_column_chooses_classes(tmp_path: Path) -> None:
    images, coarse, fine = write_cifar100(tmp_path)
    for column in ("label", "fine"):
        source = open_set("cifar100", tmp_path, label_column=column)
        assert (source.classes, source.labels.tolist()) == (("apple", "bee", "cup"), fine.tolist())
    np.testing.assert_array_equal(decode_split(source), images[:3])
    np.testing.assert_array_equal(decode_split(source, "test"), images[3:])
    source = open_set("cifar100", tmp_path, label_column="coarse")
    assert (source.classes, source.labels.tolist()) == (("food", "other"), coarse.tolist())
    assert get_refusal("cifar100", tmp_path, label_column="corse").startswith(
        "dataset.label_column: 'corse' is no label of CIFAR-100; did you mean"
    )
    assert "None" in get_refusal("cifar100", tmp_path, label_column=None)


def test_cut_file_keeps_whole_rows(ten: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root = ten[0]
    file = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    records = read_split(open_set("cifar10", root))
    assert [record.path for record in records if record.data is None] == ["data_batch_3.bin#1"]
    assert (records[5].label, records[5].reason) == (-1, "data_batch_3.bin ends before row 1 does")
    assert len(records) == 10
    file.write_bytes(b"")
    assert get_refusal("cifar10", root) == f"{file}: is empty (0 bytes); valid: rows of 3073 bytes"


def test_removed_file_is_reason_of_its_rows(ten: tuple[Path, np.ndarray, np.ndarray]) -> None:
    source = open_set("cifar10", ten[0])
    (ten[0] / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    reasons = [record.reason for record in read_split(source)]
    assert reasons == [None] * 2 + ["data_batch_2.bin cannot be read: No such file or directory"] * 2 + [None] * 6


def test_invalid_label_and_missing_file_raise(ten: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    file = folder / "test_batch.bin"
    data = bytearray(file.read_bytes())
    data[3073] = 10
    file.write_bytes(bytes(data))
    assert get_refusal("cifar10", tmp_path) == f"{file}: row 1: label 10 is out of range; valid: 0 to 9"
    file.unlink()
    message = get_refusal("cifar10", tmp_path)
    assert message.startswith(
        f"dataset.root: {str(file)!r} is missing; {str(folder)!r} holds 'batches.meta.txt', 'data_batch_1.bin'"
    )
    shutil.rmtree(folder)
    assert get_refusal("cifar10", tmp_path).endswith("holds nothing")


@pytest.mark.fault(51, "a data set as pickles")
@pytest.mark.parametrize(
    ("source", "files", "archive"),
    [
        ("cifar10", ("cifar-10-batches-py/data_batch_1",), "cifar-10-binary.tar.gz"),
        ("cifar10", ("data_batch_1", "batches.meta"), "cifar-10-binary.tar.gz"),
        ("cifar100", ("cifar-100-python/train",), "cifar-100-binary.tar.gz"),
        ("cifar100", ("train", "meta"), "cifar-100-binary.tar.gz"),
    ],
)
def test_pickled_version_is_refused(tmp_path: Path, source: str, files: tuple[str, ...], archive: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    message = get_refusal(source, tmp_path)
    assert "are pickles" in message
    assert archive in message
    assert not Path("hacked").exists()


def test_fingerprint_changes_with_files(ten: tuple[Path, np.ndarray, np.ndarray]) -> None:
    before = open_set("cifar10", ten[0]).fingerprint
    assert open_set("cifar10", ten[0]).fingerprint == before
    file = ten[0] / "cifar-10-batches-bin" / "data_batch_5.bin"
    file.write_bytes(file.read_bytes() * 2)
    assert open_set("cifar10", ten[0]).fingerprint != before


def test_published_files_are_stored(ten: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """From the published files to a store, with the cut row in quarantine."""
    file = ten[0] / "cifar-10-batches-bin" / "data_batch_1.bin"
    file.write_bytes(file.read_bytes()[:-5])
    store = prepare(
        dataset_options(source="cifar10", root=ten[0]), ten[0] / "stores", lambda: False, lambda done, total: None
    )
    assert (store.classes, store.quarantined) == (NAMES10, 1)
    assert store.labels("train").tolist() == [ten[2][0], *ten[2][2:10]]
    assert store.labels("test").tolist() == ten[2][10:].tolist()
