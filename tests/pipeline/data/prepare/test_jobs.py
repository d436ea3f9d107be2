"""A killed `prepare` resumes without decoding finished parts again, and ends in the store of an uninterrupted run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data import shards
from firstlight.pipeline.data.images import open_rgb
from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.prepare import jobs
from firstlight.pipeline.data.prepare import prepare as module
from firstlight.pipeline.data.prepare.jobs import record_path
from tests.support.grey_images import dataset, images, local, silent
from tests.support.paths import ROOT
from tests.support.stopped_prepare import Stop, contents, stop

# `prepare` in a process that is killed before or after it moves its k-th file to its final name. The process does
# not import torch, which takes seconds.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from firstlight.pipeline.data import shards
from firstlight.pipeline.data.prepare import prepare as module
fields, out, k, after = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "after"
module.IMAGES_PER_SHARD, shards.ROWS_PER_GROUP = 10, 4
replace, count = os.replace, 0
def kill(*paths):
    global count
    count += 1
    if count == k and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
    if count == k:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
module.prepare(SimpleNamespace(**fields, pixels=None), out, lambda: False, lambda done, total: None)
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetOptions:
    """45 training images, three of them bad, in 5 parts, and 6 test images: 4 parts are numbered again."""
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 10)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)
    return dataset(root=images(tmp_path / "in", 45, bad=(2, 4, 31)), max_bad_fraction=0.2)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The images that were decoded."""
    seen: list[bytes] = []
    monkeypatch.setattr(jobs, "open_rgb", lambda encoded, limit: seen.append(encoded) or open_rgb(encoded, limit))
    return seen


def kill_at(data: DatasetOptions, out: Path, k: int, when: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, data.model_dump_json(), str(out), str(k), when],
        cwd=ROOT,
        check=False,
        timeout=600,
    )
    return done.returncode


@pytest.mark.fault(8, "a prepare is killed")
@pytest.mark.parametrize(
    ("k", "when", "again"),
    [
        (1, "before", 51),  # the first shard is not in place
        (1, "after", 51),  # its record is not
        (6, "after", 21),  # three parts are done
        (14, "after", 10),  # between a renumbered shard and its record: this part only
        (17, "after", 0),  # two parts are renumbered
    ],
)
def test_only_unfinished_parts_are_decoded_after_a_kill(
    data: DatasetOptions, tmp_path: Path, decoded: list[bytes], k: int, when: str, again: int
) -> None:
    clean = local(data, tmp_path / "clean")
    decoded.clear()
    assert kill_at(data, tmp_path / "killed", k, when) == -signal.SIGKILL
    store = local(data, tmp_path / "killed")
    assert store.hash == clean.hash
    assert contents(store) == contents(clean)
    assert len(decoded) == again


def test_run_stopped_at_any_file_ends_in_the_same_bytes(
    data: DatasetOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, moves = (
        local(data, tmp_path / "clean"),
        2 * 6 + 1 + 2 * 5 + 2,
    )  # shards and records, bad, what is numbered again, duplicates, manifest
    for k in range(1, moves + 1):
        with pytest.raises(Stop):
            stop(data, tmp_path / f"stopped-{k}", k, monkeypatch)
        assert contents(local(data, tmp_path / f"stopped-{k}")) == contents(clean)
    assert stop(data, tmp_path / "no stop", moves + 1, monkeypatch).hash == clean.hash


def test_each_resumed_run_makes_progress(data: DatasetOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is stopped after three files, and some of these it has to write again."""
    stops = 0
    while stops < 20:
        with contextlib.suppress(Stop):
            store = stop(data, tmp_path / "killed", 3, monkeypatch)
            break
        stops += 1
    assert stops == 12
    assert contents(store) == contents(local(data, tmp_path / "clean"))


@pytest.mark.parametrize(
    "damage", ["shard", "cut shard", "no shard", "record", "another version", "record of other rows", "no record"]
)
def test_damaged_part_is_decoded_again(
    data: DatasetOptions, tmp_path: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    clean = local(data, tmp_path / "clean")
    with pytest.raises(Stop):
        stop(data, tmp_path / "killed", 12, monkeypatch)
    (folder,) = (tmp_path / "killed").iterdir()
    shard = folder / "train-00001.parquet"
    record = record_path(shard)
    content = bytearray(shard.read_bytes())
    if damage == "shard":
        content[50] ^= 1
        shard.write_bytes(content)
    elif damage == "cut shard":
        shard.write_bytes(content[:-1])
    elif damage == "no shard":
        shard.unlink()
    elif damage == "record":
        record.write_text(record.read_text().replace('"count":10', '"count":11'))
    elif damage == "another version":
        raw = json.loads(record.read_text())["record"]
        raw["made_by"]["Pillow"] = "1.0"
        jobs.write_record(shard, raw)
    elif damage == "record of other rows":
        raw = json.loads(record.read_text())["record"]
        raw["job"]["start"] = 20
        jobs.write_record(shard, raw)
    else:
        record.unlink()
    decoded.clear()
    assert contents(local(data, tmp_path / "killed")) == contents(clean)
    assert len(decoded) == 10


def test_changed_source_is_another_store(
    data: DatasetOptions, tmp_path: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        stop(data, tmp_path / "out", 12, monkeypatch)
    decoded.clear()
    os.utime(Path(str(data.root)) / "train" / "a" / "000.png", (1, 1))
    store = local(data, tmp_path / "out")
    assert len(decoded) == 51
    assert len([*(tmp_path / "out").iterdir()]) == 2
    assert not [file for file in store.path.iterdir() if file.suffix == ".json" and file.name != MANIFEST_FILE]


@pytest.mark.fault(16, "full disk: a record of prepare")
def test_full_disk_while_writing_a_record_is_named(
    data: DatasetOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(jobs, "write_atomically", full)
    with pytest.raises(Exception, match=r"train-00000\.parquet: cannot be written: No space left on device"):
        module.prepare(data, tmp_path, lambda: False, silent)
