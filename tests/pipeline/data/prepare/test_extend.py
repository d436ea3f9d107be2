"""An extended store keeps ids, splits, labels and bytes of earlier images; new images follow; no image is lost."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data import shards
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.manifest import DUPLICATES_FILE, MANIFEST_FILE, QUARANTINE_FILE
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.prepare import local_jobs
from firstlight.pipeline.data.prepare import prepare as module
from firstlight.pipeline.data.prepare.extend import KNOWN_FILE
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions, TrainOrder, stream_batches
from firstlight.pipeline.errors import UserError
from tests.support.extended_stores import assert_extends, rows
from tests.support.grey_images import dataset, local, png, silent
from tests.support.paths import ROOT
from tests.support.stopped_prepare import Stop, contents, stop

# `prepare` in a process that is killed when its k-th file has its final name. The process does not import torch,
# which takes seconds.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from firstlight.pipeline.data import shards
from firstlight.pipeline.data.prepare import prepare as module
module.IMAGES_PER_SHARD, shards.ROWS_PER_GROUP = 10, 4
replace, count, k = os.replace, 0, int(sys.argv[3])
def kill(*paths):
    global count
    count += 1
    replace(*paths)
    if count == k:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
data = SimpleNamespace(**json.loads(sys.argv[1]), pixels=None)
module.prepare(data, Path(sys.argv[2]), lambda: False, lambda done, total: None)
"""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 images a shard, 4 a row group."""
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 10)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)


def put(root: Path, *names: str) -> None:
    """Images whose bytes depend on their names; those with `bad` in it are cut off."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"bad" if "bad" in name else picture(name))


def picture(name: str) -> bytes:
    return png(sum(map(ord, name)) % 256) + name.encode()  # what follows the end of a PNG is not read


def by_path(store: Store) -> dict[str, tuple[int, str, str]]:
    return {path: (image_id, part, name) for image_id, (path, part, name, _) in rows(store).items()}


def start(root: Path, stores: Path, **fields: Any) -> tuple[DatasetOptions, Store]:
    """13 training images of the classes b and d, and 3 test images."""
    put(
        root,
        *(f"train/{'bd'[k % 2]}/m{k:02}.png" for k in range(12)),
        "train/b/bad.png",
        *(f"test/{c}/t{c}.png" for c in "bd"),
        "test/b/ty.png",
    )
    data = dataset(root=root, max_bad_fraction=0.5, **fields)
    return data, local(data, stores)


def grown(data: DatasetOptions, old: Store, **fields: Any) -> DatasetOptions:
    return data.model_copy(update={"extends": str(old.path), **fields})


def grow(root: Path) -> None:
    """Images before, between and behind those that there are, in new classes too, and test images."""
    put(
        root,
        *(f"train/{c}/{x}{k}.png" for c in "abce" for x in "az" for k in range(3)),
        "train/c/bad.png",
        "test/a/t.png",
        "test/b/a.png",
    )


def test_new_images_get_ids_after_the_old_ones(tmp_path: Path) -> None:
    data, old = start(tmp_path / "in", tmp_path / "out")
    before = contents(old)
    grow(tmp_path / "in")
    calls: list[tuple[int, int]] = []
    new = prepare(grown(data, old), tmp_path / "out", lambda: False, lambda done, total: calls.append((done, total)))
    assert_extends(new, old)
    assert contents(old) == before
    assert new.classes == ("b", "d", "a", "c", "e")
    assert new.splits == {"train": 36, "test": 5}
    assert [(shard.file, shard.first_id) for shard in new.shards] == [
        ("train-00000.parquet", 0),
        ("train-00001.parquet", 9),
        ("test-00000.parquet", 12),
        ("train-00002.parquet", 15),
        ("train-00003.parquet", 24),
        ("train-00004.parquet", 33),
        ("test-00001.parquet", 39),
    ]
    assert new.ids("train").tolist() == [*range(12), *range(15, 39)]
    assert new.ids("test").tolist() == [12, 13, 14, 39, 40]
    added = [path for path, *_ in [*rows(new).values()][15:]]
    assert added == [
        *(f"train/{c}/{x}{k}.png" for c in "abce" for x in "az" for k in range(3)),
        "test/a/t.png",
        "test/b/a.png",
    ]
    assert all(path.split("/")[:2] == [part, name] for path, (_, part, name) in by_path(new).items())
    assert new.labels("test").tolist() == [0, 0, 1, 2, 0]
    assert new.labels().tolist() == new.read(np.arange(41))[1].tolist()
    assert new.list_row_groups("test")[:, 2].tolist() == [12, 39]
    assert (
        sorted([*new.list_row_groups("train")[:, 2], *new.list_row_groups("test")[:, 2]])
        == new._all_row_groups[:, 2].tolist()
    )
    assert [row["path"] for row in pq.read_table(new.path / QUARANTINE_FILE).to_pylist()] == [
        "train/b/bad.png",
        "train/c/bad.png",
    ]
    assert new.quarantined == 2
    assert json.loads((new.path / MANIFEST_FILE).read_text())["extends"] == [
        {"name": old.path.name, "hash": old.hash, "ids": 15}
    ]
    assert calls[:3] == [(9, 15), (12, 15), (15, 15)]  # the old store is verified
    assert calls[-1] == (43, 43)  # 15 images of the old store, and 28 that are decoded
    assert not [*new.path.glob("match-*"), *new.path.glob(KNOWN_FILE)]


def test_statistics_and_duplicates_cover_all_images(tmp_path: Path) -> None:
    root = tmp_path / "in"
    data, old = start(root, tmp_path / "out")
    grow(root)
    for copy, of in (
        ("train/a/copy.png", "test/b/tb.png"),
        ("test/e/copy.png", "train/d/m01.png"),
        ("train/e/copy.png", "train/a/a0.png"),
    ):
        put(root, copy)
        shutil.copyfile(root / of, root / copy)
    new = local(grown(data, old), tmp_path / "out")
    whole = local(data, tmp_path / "whole")
    assert new.images == whole.images
    assert new.images["duplicates"] == {"copies": 3, "of_train_in_test": 2}
    ids = {path: image_id for path, (image_id, *_) in by_path(new).items()}
    assert pq.read_table(new.path / DUPLICATES_FILE).to_pylist() == [
        {"id": ids["test/b/tb.png"], "first_id": ids["train/a/copy.png"], "split": "test", "path": "test/b/tb.png"},
        {
            "id": ids["train/e/copy.png"],
            "first_id": ids["train/a/a0.png"],
            "split": "train",
            "path": "train/e/copy.png",
        },
        {"id": ids["test/e/copy.png"], "first_id": ids["train/d/m01.png"], "split": "test", "path": "test/e/copy.png"},
    ]


def test_list_may_be_reordered_and_name_an_image_twice(tmp_path: Path) -> None:
    root, file = tmp_path / "in", tmp_path / "in" / "list.csv"
    names = [f"{k:02}.png" for k in range(8)]
    put(root, *names, "new.png")

    def listed(lines: list[str]) -> None:
        file.write_text("path,label,split\n" + "\n".join(lines))

    listed([f"{name},{k % 2},{'test' if k > 5 else 'train'}" for k, name in enumerate(names)])
    data = dataset(source="list", list=file, split_column="split", max_bad_fraction=0.5)
    old = local(data, tmp_path / "out")
    lines = file.read_text().splitlines()[1:]
    listed(["new.png,2,train", *lines[::-1], "03.png,1,train", "03.png,1,test"])
    new = local(grown(data, old), tmp_path / "out")
    assert_extends(new, old)
    assert by_path(new)["new.png"] == (8, "train", "2")
    assert (len(rows(new)), new.quarantined, new.classes) == (9, 0, ("0", "1", "2"))


def test_numbered_classes_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    put(tmp_path, *(f"{k:02}.png" for k in range(12)))
    file.write_text("path,label\n" + "\n".join(f"{k:02}.png,{k}" for k in range(9)))
    data = dataset(source="list", list=file, test_fraction=0.0)
    old = local(data, tmp_path / "out")
    file.write_text("path,label\n" + "\n".join(f"{k:02}.png,{k}" for k in range(12)))
    new = local(grown(data, old), tmp_path / "out")
    assert new.classes == tuple(map(str, range(12)))
    assert new.labels().tolist() == list(range(12))


def test_test_split_is_taken_from_new_images_only(tmp_path: Path) -> None:
    put(tmp_path / "in", *(f"{c}/{k:02}.png" for c in "bc" for k in range(10)))
    data = dataset(root=tmp_path / "in", test_fraction=0.3)
    old = local(data, tmp_path / "out")
    assert old.splits == {"train": 14, "test": 6}
    put(tmp_path / "in", *(f"{c}/{k:02}-new.png" for c in "ab" for k in range(10)))
    new = local(grown(data, old), tmp_path / "out")
    assert_extends(new, old)
    assert new.splits == {"train": 28, "test": 12}
    assert np.bincount(new.labels("test")).tolist() == [6, 3, 3]


def test_repaired_quarantined_image_is_new(tmp_path: Path) -> None:
    data, old = start(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/train/b/bad.png").write_bytes(picture("mended"))
    new = local(grown(data, old), tmp_path / "out")
    assert_extends(new, old)
    assert by_path(new)["train/b/bad.png"] == (15, "train", "b")
    assert (old.quarantined, new.quarantined) == (1, 0)


def test_extension_without_new_images_is_valid(tmp_path: Path) -> None:
    data, old = start(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/train/b/bad.png").unlink()
    new = local(grown(data, old), tmp_path / "out")
    assert_extends(new, old)
    assert new.shards == old.shards
    put(tmp_path / "in", "test/b/z.png")
    newest = local(grown(data, new), tmp_path / "out")
    assert_extends(newest, new)
    assert newest.splits == {"train": 12, "test": 4}


def test_chain_of_three_survives_deletion_of_old_stores(tmp_path: Path) -> None:
    data, first = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    second = local(grown(data, first), tmp_path / "out")
    put(tmp_path / "in", "train/0/first.png", "train/b/b.png", "test/e/0.png")
    data = grown(data, second)
    third = local(data, tmp_path / "out")
    assert_extends(third, second)
    assert third.extension_edges == [0, 15, 41, 44]
    assert third.classes == ("b", "d", "a", "c", "e", "0")
    shutil.rmtree(first.path)
    shutil.rmtree(second.path)
    again = local(data, tmp_path / "out")  # verifies
    assert again == third
    with pytest.raises(UserError, match=r"no manifest\.json"):
        local(data.model_copy(update={"extends": str(first.path)}), tmp_path / "out")  # that was not the one
    assert len(rows(again)) == 44
    (third.path / MANIFEST_FILE).unlink()
    with pytest.raises(
        UserError, match=r"^dataset\.extends: '.*tiny-.*' has no manifest\.json; valid: the folder of a finished store$"
    ):
        local(data, tmp_path / "out")


def test_shards_are_linked_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, old = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    linked = local(grown(data, old), tmp_path / "linked")

    def refused(*_: object) -> None:
        raise OSError(18, os.strerror(18))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        copied = local(grown(data, old), tmp_path / "copied")
    assert linked.hash == copied.hash
    assert contents(linked) == contents(copied)
    for shard in old.shards:
        assert (linked.path / shard.file).samefile(old.path / shard.file)
        assert not (copied.path / shard.file).samefile(old.path / shard.file)


def missing(root: Path) -> None:
    (root / "train/b/m04.png").unlink()
    (root / "test/d/td.png").unlink()


def changed(root: Path) -> None:
    put(root, "train/d/m03.png")
    (root / "train/d/m03.png").write_bytes(picture("other"))


def emptied(root: Path) -> None:
    shutil.rmtree(root / "train/d")
    shutil.rmtree(root / "test/d")


def relabelled(root: Path) -> None:
    rewrite(root, lambda k, label, part: (label if k != 5 else "x", part))


def unlabelled(root: Path) -> None:
    rewrite(root, lambda k, label, part: (label if k not in (5, 7) else "", part))


def moved(root: Path) -> None:
    rewrite(root, lambda k, label, part: (label, {2: "test", 7: "train"}.get(k, part)))


def rewrite(root: Path, change: Callable[[int, str, str], tuple[str, str]]) -> None:
    facts = [(f"{k:02}.png", *change(k, "xy"[k % 2], "test" if k > 5 else "train")) for k in range(9)]
    (root / "list.csv").write_text("path,label,split\n" + "\n".join(map(",".join, facts)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            missing,
            r"2 of the 15 images of .* are no longer in the source as they were, "
            r"e\.g\. train/b/m04\.png \(is missing\)",
        ),
        (changed, r"1 of the 15 images of .* e\.g\. train/d/m03\.png \(has other bytes, or cannot be read\)"),
        (emptied, r"1 of the 2 classes of .* are not in the source, e\.g\. 'd'"),
        (relabelled, r"1 of the 9 images of .* have another label in the source, e\.g\. 05\.png \(was 'y', is 'x'\)"),
        (
            unlabelled,
            r"2 of the 9 images of .* have another label in the source, e\.g\. 05\.png \(was 'y', is unknown\)",
        ),
        (moved, r"2 of the 9 images of .* have another split in the source, e\.g\. 02\.png \(was train, is test\)"),
    ],
)
def test_changed_old_images_are_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    root = tmp_path / "in"
    if change in (relabelled, unlabelled, moved):
        put(root, *(f"{k:02}.png" for k in range(9)))
        rewrite(root, lambda k, label, part: (label, part))
        data = dataset(source="list", list=root / "list.csv", split_column="split")
        old = local(data, tmp_path / "out")
    else:
        data, old = start(root, tmp_path / "out")
        grow(root)
    before = contents(old)
    change(root)
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"^dataset\.extends: {message}; .*prepare a new store without dataset\.extends$"
        ) as caught:
            local(grown(data, old), tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert contents(old) == before
    assert not [store for store in (tmp_path / "out").glob(f"*/{MANIFEST_FILE}") if store.parent != old.path]


def test_image_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    """Its fingerprint is the same before and after, so nothing may be remembered of it."""
    root = tmp_path / "in"
    data, old = start(root, tmp_path / "out")
    grow(root)
    file = root / "train/d/m03.png"
    facts, content = file.stat(), file.read_bytes()
    file.write_bytes(bytes(len(content)))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(UserError, match=r"m03\.png \(has other bytes"):
        local(grown(data, old), tmp_path / "out")
    file.write_bytes(content)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert_extends(local(grown(data, old), tmp_path / "out"), old)


def test_damaged_or_missing_earlier_store_is_named(tmp_path: Path) -> None:
    data, old = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    shard = old.path / "train-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    asked: list[bool] = []
    for damage, message in (
        (lambda: None, r"train-00000\.parquet: is missing or damaged: its sha256 is not the manifest's"),
        (shard.unlink, r"train-00000\.parquet: is missing or damaged: No such file"),
        ((old.path / MANIFEST_FILE).unlink, r"'.*' has no manifest\.json; valid"),
    ):
        damage()
        with pytest.raises(UserError, match=rf"^dataset\.extends: .*{message}") as caught:
            prepare(grown(data, old), tmp_path / "out", lambda: asked.append(True) or False, silent)
        assert "delete the folder" not in str(caught.value)
    assert not asked, "Ray was started"


@pytest.fixture
def killable(tmp_path: Path) -> tuple[DatasetOptions, Store]:
    data, old = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    data = grown(data, old)
    return data, local(data, tmp_path / "clean")


def test_extension_stopped_at_any_file_ends_in_the_same_bytes(
    tmp_path: Path, killable: tuple[DatasetOptions, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, clean = killable
    for k in itertools.count(1):
        try:
            assert stop(data, tmp_path / f"stopped-{k}", k, monkeypatch).hash == clean.hash
            break
        except Stop:
            assert contents(local(data, tmp_path / f"stopped-{k}")) == contents(clean)
    assert (
        k == 1 + 5 + 3 + 2 * 4 + 1 + 2 * 3 + 2 + 1
    )  # known, matches, links, parts, bad, renumbered, copies and manifest; none is left


@pytest.mark.fault(8, "an extension is killed")
@pytest.mark.parametrize("k", [4, 9, 14])
def test_killed_extension_is_resumed(tmp_path: Path, killable: tuple[DatasetOptions, Store], k: int) -> None:
    data, clean = killable
    command = [sys.executable, "-c", KILLED, data.model_dump_json(), str(tmp_path / "killed"), str(k)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=600).returncode == -signal.SIGKILL
    store = local(data, tmp_path / "killed")
    assert store.hash == clean.hash
    assert contents(store) == contents(clean)


NAMES = [f"{c}/{x}{k}.png" for c in "abcd" for x in "mz" for k in range(4)]


@st.composite
def growth(draw: st.DrawFn) -> list[list[str]]:
    """The names that each of up to four stores adds; the first has some."""
    names = draw(st.permutations(NAMES))
    cuts = sorted(draw(st.lists(st.integers(1, len(names)), min_size=1, max_size=4)))
    return [names[a:b] for a, b in itertools.pairwise([0, *cuts])]


def shuffled(seed: int) -> Callable[..., Iterator[Any]]:
    """Returns a function that runs jobs as `_each` does, in another order."""
    return lambda on_ray, processes, is_busy, work, jobs: iter(
        [work(jobs[k]) for k in np.random.default_rng(seed).permutation(len(jobs))]
    )


@given(added=growth(), seed=st.integers(0, 5))
@settings(max_examples=15)
def test_ids_are_kept_however_a_source_grows(added: list[list[str]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root, old = Path(folder) / "in", None
        for names in added:
            put(root, *names)
            data = dataset(root=root, test_fraction=0.3)
            data = data if old is None else grown(data, old)
            new = local(data, Path(folder) / "out")
            patch.setattr(module, "_run_jobs", shuffled(seed))
            patch.setattr(module, "IMAGES_PER_SHARD", 10)
            assert contents(local(data, Path(folder) / "shuffled")) == contents(new)
            patch.undo()
            patch.setattr(module, "IMAGES_PER_SHARD", 10)
            if old is not None:
                assert_extends(new, old)
                assert_no_image_changes_sides(old, new, data)
            old = new
        assert sorted(by_path(old)) == sorted(itertools.chain(*added))
        assert all(path.startswith(f"{name}/") for path, (_, _, name) in by_path(old).items())


def assert_no_image_changes_sides(old: Store, new: Store, data: DatasetOptions) -> None:
    before, after = (draw_splits(store, data.model_copy(update={"val_fraction": 0.4})) for store in (old, new))
    for name in ("train", "val", "test"):
        mine = getattr(after, name)
        assert mine[mine < old.extension_edges[-1]].tolist() == getattr(before, name).tolist()
    held, all_of = (np.bincount(new.labels()[ids], minlength=4) for ids in (after.val, new.ids("train")))
    assert held.tolist() == [round(0.4 * n) for n in all_of.tolist()]


def test_subset_of_given_size_is_kept_by_an_extension(tmp_path: Path) -> None:
    data, old = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    new = local(grown(data, old), tmp_path / "out")
    few, more = ({"max_train": n, "max_test": m, "val_fraction": 0.4} for n, m in ((9, 2), (30, 4)))
    before, after = (draw_splits(store, data.model_copy(update=few)) for store in (old, new))
    assert all(np.array_equal(getattr(before, name), getattr(after, name)) for name in ("train", "val", "test"))
    larger = draw_splits(new, data.model_copy(update=more))
    assert len(larger.train) + len(larger.val) == 30
    assert {*old.ids("train")} <= {*larger.train.tolist(), *larger.val.tolist()}
    assert {*old.ids("test")} <= {*larger.test.tolist()}
    assert (len(larger.test), {*larger.test} - {*new.ids("test")}) == (4, set())


@pytest.mark.parametrize("windowed", [False, True])
def test_training_on_extended_store_has_every_image_once_per_epoch(tmp_path: Path, windowed: bool) -> None:
    data, old = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    new = local(grown(data, old), tmp_path / "out")
    plan = BatchPlan(new.ids("train"), new.list_row_groups("train")[:, 2], 6, 0, 12, windowed)
    loader = Loader(new, (({"op": "center_crop"},),), 4, 0, 1_000_000)
    found = [
        *stream_batches(
            loader,
            TrainOrder(plan, 0, 1, 0, 2 * plan.steps),
            6,
            LoadingOptions(on_ray=False, prefetch=2, tasks=2, task_cpus=0.25),
        )
    ]
    for epoch in (found[: plan.steps], found[plan.steps :]):
        ids = np.concatenate([batch["id"] for batch in epoch])
        assert np.sort(ids).tolist() == new.ids("train").tolist()
        assert np.concatenate([batch["label"] for batch in epoch]).tolist() == new.labels()[ids].tolist()


@pytest.mark.ray
def test_ray_extends_to_the_same_bytes(tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 128)  # as in Ray's workers
    data, old = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    first, second = (
        prepare(grown(data, old), tmp_path / f"ray {ray}", lambda ray=ray: ray, silent) for ray in (False, True)
    )
    assert_extends(second, old)
    assert contents(first) == contents(second)


def test_several_processes_extend_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 128)  # as in other processes
    data, old = start(tmp_path / "in", tmp_path / "out")
    grow(tmp_path / "in")
    started: list[tuple[str, int]] = []
    start_others = local_jobs._OtherProcesses.start

    def follow(others: Any, count: int) -> None:
        started.append((type(others.work).__name__, count))
        start_others(others, count)

    monkeypatch.setattr(local_jobs._OtherProcesses, "start", follow)
    alone = prepare(grown(data, old), tmp_path / "one", lambda: False, silent, processes=3)
    assert not started, "it takes no two seconds"
    monkeypatch.setattr(local_jobs, "SECONDS_ALONE", 0.0)
    together = prepare(grown(data, old), tmp_path / "many", lambda: False, silent, processes=3)
    assert started[0] == ("Matcher", 2)
    assert ("PartWriter", 2) in started
    assert_extends(together, old)
    assert contents(alone) == contents(together)


def test_held_out_folder_stays_held_out_in_an_extension(tmp_path: Path) -> None:
    root = tmp_path / "in"
    put(root, *(f"{part}/{kind}/{k}.png" for part, n in (("train", 12), ("val", 4)) for kind in "ab" for k in range(n)))
    data = dataset(root=root, test_fraction=0.25)
    old = local(data, tmp_path / "out")
    assert old.splits == {"train": 18, "val": 8, "test": 6}
    put(root, *(f"{part}/a/new{k}.png" for part, n in (("train", 8), ("val", 3)) for k in range(n)))
    new = local(grown(data, old), tmp_path / "out")
    assert_extends(new, old)
    assert new.splits == {"train": 24, "val": 11, "test": 8}
    assert {part for path, (_, part, _) in by_path(new).items() if path.startswith("val/")} == {"val"}
    (root / "val" / "a" / "0.png").rename(root / "train" / "a" / "0b.png")
    with pytest.raises(
        UserError, match=r"1 of the 32 images of .* are no longer in the source as they were, e\.g\. val/a/0\.p"
    ):
        local(grown(data, old), tmp_path / "out")


def test_image_that_left_the_held_out_folder_is_refused(tmp_path: Path) -> None:
    root, file = tmp_path / "in", tmp_path / "in" / "list.csv"
    put(root, *(f"{k}.png" for k in range(8)))
    data = dataset(source="list", list=file, split_column="part")

    def listed(*splits: str) -> None:
        file.write_text("path,label,part\n" + "".join(f"{k}.png,{k % 2},{part}\n" for k, part in enumerate(splits)))

    listed(*["train"] * 4, "val", "val", "test", "test")
    old = local(data, tmp_path / "out")
    listed(*["train"] * 5, "val", "test", "test")
    with pytest.raises(
        UserError, match=r"1 of the 8 images .* another split in the source, e\.g\. 4\.png \(was val, is train\)"
    ):
        local(grown(data, old), tmp_path / "out")
    listed(*["train"] * 8)
    with pytest.raises(
        UserError, match=r"2 of the 8 images .* another split in the source, e\.g\. 4\.png \(was val, is train\)"
    ):
        local(grown(data, old), tmp_path / "out")
