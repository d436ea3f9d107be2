"""Tar archives of samples: keys, labels, splits, names, hostile members, damage."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from firstlight.pipeline.data.sources import Record, Source, open_source, webdataset
from firstlight.pipeline.data.sources import tar_index as module
from firstlight.pipeline.data.store import QUARANTINE
from firstlight.pipeline.errors import UserError
from tests.support.tiny import dataset, everything, picture, prepared, summary

Member = tuple[str, bytes] | tarfile.TarInfo


def shard(file: Path, *members: Member) -> Path:
    """An archive of names and contents, and of members that are no files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz" if file.suffix in (".gz", ".tgz") else "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def samples(*keys: str) -> list[Member]:
    """Images whose contents are their keys, labelled by the number in the key."""
    return [member for key in keys for member in ((f"{key}.jpg", key.encode()), (f"{key}.cls", key[-1].encode()))]


def archives(root: Path | str, **fields: Any) -> Source:
    return open_source(dataset(source="webdataset", root=root, **fields))


def reasons(source: Source) -> list[tuple[str, str]]:
    return [(record.path, record.reason) for record in everything(source) if record.reason is not None]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_samples(tmp_path: Path, suffix: str) -> None:
    shard(
        tmp_path / f"b{suffix}",
        *samples("x/y/0002", "x/y/0001"),
        special("x", tarfile.DIRTYPE),
        ("x/.hidden.jpg", b""),
        ("README", b"x"),
    )
    shard(tmp_path / f"a{suffix}", *samples("0000"))
    source = pickle.loads(pickle.dumps(archives(tmp_path)))
    assert (source.classes, source.splits) == (("0", "1", "2"), {"train": 3})
    assert everything(source) == [
        Record(f"a{suffix}/0000.jpg", b"0000", 0),
        Record(f"b{suffix}/x/y/0002.jpg", b"x/y/0002", 2),
        Record(f"b{suffix}/x/y/0001.jpg", b"x/y/0001", 1),
    ]


def test_labels(tmp_path: Path) -> None:
    def label(key: str, **record: Any) -> list[Member]:
        return [(f"{key}.png", b""), (f"{key}.json", json.dumps(record).encode()), (f"{key}.txt", b"a caption")]

    shard(
        tmp_path / "x.tar",
        *label("a", label="dog", kind=1),
        *label("b", kind=0),
        *label("c", label="cat"),
        ("d.png", b""),
        ("d.cls", b"cat\n"),
    )
    source = archives(tmp_path)
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, -1, 0, 0])
    assert (archives(tmp_path, label_column="txt").classes, archives(tmp_path, label_column=None).classes) == (
        ("a caption", "cat"),
        (),
    )
    shard(tmp_path / "x.tar", *label("a", kind=1), *label("b", kind=0))
    assert archives(tmp_path, label_column="kind").labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("auk\n")
    with pytest.raises(UserError, match=r"x\.tar/a\.png: label 1 is out of range: .*classes\.txt has 1 classes"):
        archives(tmp_path, label_column="kind")


@pytest.mark.parametrize(
    "record", [b"{", b"[" * 100_000, b'{"label": 0.5}', b'{"label": true}', b'{"label": [1]}', b"\xff"]
)
def test_labels_that_cannot_be_read(tmp_path: Path, record: bytes) -> None:
    shard(tmp_path / "x.tar", ("a.png", b"a"), ("a.json", record), *samples("b0"))
    assert reasons(archives(tmp_path)) == [("x.tar/a.png", "the label of 'a.json' cannot be read")]


def test_a_label_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LABEL", 10)
    shard(tmp_path / "x.tar", ("a.png", b"a"), ("a.cls", b"1" * 600), *samples("b0"))
    assert reasons(archives(tmp_path)) == [("x.tar/a.png", "the label of 'a.cls' is larger than 10 bytes")]


@pytest.mark.parametrize(
    ("others", "test"), [(["test", "val"], "test"), (["val"], "val"), (["validation"], "validation")]
)
def test_splits(tmp_path: Path, others: list[str], test: str) -> None:
    for name in ("train", *others):
        shard(tmp_path / f"{name}-000.tar", *samples(f"{name}0", f"{name}1"))
    source = archives(tmp_path, test_fraction=0.5)
    assert [record.data for record in everything(source)] == [b"train0", b"train1"]
    assert [record.data for record in everything(source, "test")] == [f"{test}0".encode(), f"{test}1".encode()]


def test_roots_that_name_archives(tmp_path: Path) -> None:
    for k in range(8, 12):
        shard(tmp_path / f"part-{k:02d}.tar", *samples(f"k{k}"))
    for root, found in (
        ("part-{08..10}.tar", ["k8", "k9", "k10"]),
        ("part-1?.tar", ["k10", "k11"]),
        ("part-{08..09}*.tar", ["k8", "k9"]),
        ("part-09.tar", ["k9"]),
    ):
        for top in (str(tmp_path), tmp_path.as_uri()):
            assert [record.data for record in everything(archives(f"{top}/{root}"))] == [key.encode() for key in found]
    for root, text in (
        ("part-{08..12}.tar", r"part-12\.tar: cannot be read: No such file"),
        ("x-*.tar", r"no x-\*\.tar files in"),
        ("part-{9..8}.tar", r"'\{9\.\.8\}' is no range"),
        ("part-{0..9999999999}.tar", "is no range of 1 to"),
        ("none", "does not exist"),
        ("none/x.tar", "does not exist"),
    ):
        with pytest.raises(UserError, match=rf"^dataset\.root: .*{text}"):
            archives(tmp_path / root)
    with pytest.raises(UserError, match=r"^dataset\.root: no \*\.tar, \*\.tar\.gz, \*\.tgz files in"):
        archives((tmp_path / "empty").mkdir() or tmp_path / "empty")


@pytest.mark.fault(53, "links, devices and names that lead out of an archive")
def test_hostile_members(tmp_path: Path) -> None:
    shard(
        tmp_path / "x.tar",
        *samples("../../up0", "/abs1"),
        special("link2.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard3.jpg", tarfile.LNKTYPE, "../../up0.jpg"),
        special("dev4.jpg", tarfile.CHRTYPE),
        special("pipe5.jpg", tarfile.FIFOTYPE),
        special("odd6.jpg", b"Z"),
        ("new\nline7.jpg", b"7"),
    )
    source = archives(tmp_path)
    assert [(record.path, record.data) for record in everything(source) if record.data is not None] == [
        ("x.tar/../../up0.jpg", b"../../up0"),
        ("x.tar//abs1.jpg", b"/abs1"),
        ("x.tar/new\nline7.jpg", b"7"),
    ]
    assert reasons(source) == [
        ("x.tar/link2.jpg", "is no plain file but a link to /etc/passwd"),
        ("x.tar/hard3.jpg", "is no plain file but a link to ../../up0.jpg"),
        ("x.tar/dev4.jpg", "is no plain file but a device or pipe"),
        ("x.tar/pipe5.jpg", "is no plain file but a device or pipe"),
        ("x.tar/odd6.jpg", "is no plain file but of the type b'Z'"),
    ]
    assert os.listdir(tmp_path) == ["x.tar"]


def test_samples_that_are_not_one_image_with_one_label(tmp_path: Path) -> None:
    shard(
        tmp_path / "x.tar",
        *samples("a0", "b1", "a0"),
        *[("c.left.png", b"l"), ("c.right.png", b"r"), ("c.cls", b"2")],
        *[("d.png", b"d"), ("d.cls", b"0"), ("d.cls", b"1")],
        *[("e.cls", b"1"), ("f.jpg", b"f"), ("__metadata__.json", b"{}")],
    )
    source = archives(tmp_path)
    assert reasons(source) == [
        ("x.tar/a0.jpg", "is a second image of its sample"),
        ("x.tar/c.right.png", "is a second image of its sample"),
        ("x.tar/d.png", "the sample has two labels"),
        ("x.tar/e.cls", "the sample has no image"),
    ]
    found = {record.path: record.label for record in everything(source) if record.data}
    assert found == {"x.tar/a0.jpg": 0, "x.tar/b1.jpg": 1, "x.tar/c.left.png": 2, "x.tar/f.jpg": -1}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_damage_costs_what_follows_it(tmp_path: Path, suffix: str) -> None:
    plain = shard(tmp_path / "whole.tar", *samples("a0", "b1", "c2")).read_bytes()
    header = plain.index(b"c2.jpg")
    damage = {
        "in a member": (plain[: header + 513], 2),
        "in a header": (plain[: header + 100], 2),
        "between members": (plain[:header], 2),
        "a header that is none": (plain[:header] + b"?" * 512 + plain[header + 512 :], 2),
        "at the start": (b"?" * 2048, 0),
        "of no bytes": (b"", 0),
    }
    (tmp_path / "whole.tar").unlink()
    shard(tmp_path / "a.tar", *samples("z0"))
    for what, (data, whole) in damage.items():
        (tmp_path / f"b{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        records = everything(archives(tmp_path))
        assert [record.data for record in records if record.reason is None] == [b"z0", b"a0", b"b1"][: 1 + whole], what
        assert [record.path for record in records if record.reason is not None] == [f"b{suffix}"], what
        assert str(records[-1].reason).startswith("the archive is damaged, what follows is lost: "), what


def test_damage_to_the_compression(tmp_path: Path) -> None:
    file = shard(tmp_path / "b.tar.gz", *[(f"{k}.jpg", os.urandom(50_000)) for k in range(8)])
    whole, data = everything(archives(tmp_path)), file.read_bytes()
    source = archives(tmp_path)
    file.write_bytes(data[: len(data) // 2])
    assert [record.path for record in everything(source)] == [f"b.tar.gz/{k}.jpg" for k in range(8)]
    read = [record.data for record in everything(source) if record.data is not None]
    assert 1 <= len(read) < 8
    assert read == [record.data for record in whole[: len(read)]]
    assert all("b.tar.gz cannot be read: " in str(record.reason) for record in everything(source)[len(read) :])
    anew = everything(archives(tmp_path))
    assert [record.path for record in anew if record.reason] == ["b.tar.gz"]


@pytest.mark.fault(53, "a header of gigabytes")
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    header = special("x", kind)
    header.size = 8**11 - 1
    file = shard(tmp_path / "a.tar", *samples("0001"))
    file.write_bytes(
        file.read_bytes()[: 4 * tarfile.BLOCKSIZE] + header.tobuf(tarfile.GNU_FORMAT) + bytes(4 * tarfile.BLOCKSIZE)
    )
    assert reasons(archives(tmp_path)) == [
        ("a.tar", "the archive is damaged, what follows is lost: a header of 8589934591 bytes (at most 1048576)")
    ]


@pytest.mark.fault(53, "headers without end")
def test_headers_without_end_are_damage(tmp_path: Path) -> None:
    name = special("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    name.size = 4
    file = shard(tmp_path / "a.tar", *samples("0001"))
    endless = (name.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(tarfile.BLOCKSIZE, b"\0")) * 3_000
    file.write_bytes(file.read_bytes()[: 4 * tarfile.BLOCKSIZE] + endless)
    ((path, reason),) = reasons(archives(tmp_path))
    assert path == "a.tar"
    assert reason.startswith("the archive is damaged, what follows is lost: maximum recursion depth")


@pytest.mark.fault(53, "a member of gigabytes")
def test_a_member_too_large_to_be_an_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 4)
    shard(tmp_path / "a.tar", ("1.jpg", b"four"), ("2.jpg", b"fives"))
    assert [(record.path, record.data) for record in everything(archives(tmp_path))] == [
        ("a.tar/1.jpg", b"four"),
        ("a.tar/2.jpg", None),
    ]


@pytest.mark.parametrize("name", ["extra", "val"])
def test_archives_of_no_split_are_told(tmp_path: Path, name: str) -> None:
    for part in ("train", "test", name):
        shard(tmp_path / f"{part}-0.tar", *samples("0000"))
    assert archives(tmp_path).aside == f"not read, as others are named for the splits: {name}-0.tar"


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"nonsense" * 1000)
    with pytest.raises(
        UserError, match=r"dataset\.root: no images, but e\.g\. 'the archive is damaged.* in a\.tar of "
    ):
        archives(tmp_path)
    shard(tmp_path / "a.tar", ("a.txt", b""))
    with pytest.raises(UserError, match=r"dataset\.root: no images in a\.tar of "):
        archives(tmp_path)


def test_what_changed_since_is_a_reason(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", *samples("a0", "b1"))
    source = archives(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert reasons(source) == [("a.tar/a0.jpg", "a.tar ends before it"), ("a.tar/b1.jpg", "a.tar ends before it")]
    (tmp_path / "a.tar").unlink()
    assert [reason for _, reason in reasons(source)] == [
        f"a.tar cannot be read: [Errno 2] No such file or directory: '{tmp_path}/a.tar'"
    ] * 2


def test_the_fingerprint_follows_the_archives(tmp_path: Path) -> None:
    seen = {archives(shard(tmp_path / "a.tar", *samples("a0")).parent).fingerprint}
    assert archives(tmp_path).fingerprint in seen
    os.utime(tmp_path / "a.tar", (1, 1))
    seen.add(archives(tmp_path).fingerprint)
    seen.add(archives(shard(tmp_path / "b.tar", *samples("b0")).parent).fingerprint)
    (tmp_path / "classes.txt").write_text("a\n")
    seen.add(archives(tmp_path).fingerprint)
    assert len(seen) == 4


def test_parts_read_by_place_and_list_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"k{k:02d}" for k in range(20)]
    shard(tmp_path / "a.tar", *samples(*keys[:9]))
    shard(tmp_path / "b.tar.gz", *samples(*keys[9:]))
    source = archives(tmp_path, test_fraction=0.3)
    monkeypatch.setattr(webdataset, "contents", None)  # reading, and a second opening, list nothing again
    assert archives(tmp_path, test_fraction=0.3).fingerprint == source.fingerprint
    for rows in (1, 3, 20):
        read = [str((record.data or b"").decode()) for part in source.parts(rows) for record in source.read(part)]
        assert sorted(read) == keys
        assert read[: source.splits["train"]] == sorted(read[: source.splits["train"]])


def test_archives_become_a_store(tmp_path: Path) -> None:
    def of(*numbers: int) -> list[Member]:
        return [member for k in numbers for member in ((f"{k:03d}.png", picture(k)), (f"{k:03d}.cls", b"%d" % (k % 2)))]

    shard(tmp_path / "tars" / "train-0.tar", *of(*range(8)), special("x.png", tarfile.SYMTYPE, "000.png"))
    shard(tmp_path / "tars" / "train-1.tar.gz", *of(*range(8, 16)))
    shard(tmp_path / "tars" / "test-0.tar", *of(16, 17))
    store = prepared(dataset(source="webdataset", root=tmp_path / "tars"), tmp_path / "stores")
    assert (store.quarantined, store.splits) == (1, {"train": 16, "test": 2})
    assert store.labels("train").tolist() == [0, 1] * 8
    assert pq.read_table(store.path / QUARANTINE).column("path").to_pylist() == ["train-0.tar/x.png"]
    assert summary(archives(tmp_path / "tars"), "test") == [("test-0.tar/016.png", 0), ("test-0.tar/017.png", 1)]
