"""The index of a tar archive: labels, hostile members and damage."""

import gzip
import os
import tarfile
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import tar_index as module
from tests.support.image_sources import list_reasons, open_archives, read_split
from tests.support.webdataset_shards import make_samples, make_special_member, write_shard


@pytest.mark.parametrize("record", [b"{", b"[" * 100_000, b'{"label": 0.5}', b'{"label": [1]}', b"\xff"])
def test_unreadable_label_is_reason(tmp_path: Path, record: bytes) -> None:
    write_shard(tmp_path / "x.tar", ("a.png", b"a"), ("a.json", record), *make_samples("b0"))
    assert list_reasons(open_archives(tmp_path)) == [("x.tar/a.png", "the label of 'a.json' cannot be read")]


def test_too_large_label_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LABEL_BYTES", 10)
    write_shard(tmp_path / "x.tar", ("a.png", b"a"), ("a.cls", b"1" * 600), *make_samples("b0"))
    assert list_reasons(open_archives(tmp_path)) == [("x.tar/a.png", "the label of 'a.cls' is larger than 10 bytes")]


@pytest.mark.fault(53, "links, devices and names that lead out of an archive")
def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "x.tar",
        *make_samples("../../up0", "/abs1"),
        make_special_member("link2.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        make_special_member("hard3.jpg", tarfile.LNKTYPE, "../../up0.jpg"),
        make_special_member("dev4.jpg", tarfile.CHRTYPE),
        make_special_member("pipe5.jpg", tarfile.FIFOTYPE),
        make_special_member("odd6.jpg", b"Z"),
        ("new\nline7.jpg", b"7"),
    )
    source = open_archives(tmp_path)
    assert [(record.path, record.data) for record in read_split(source) if record.data is not None] == [
        ("x.tar/../../up0.jpg", b"../../up0"),
        ("x.tar//abs1.jpg", b"/abs1"),
        ("x.tar/new\nline7.jpg", b"7"),
    ]
    assert list_reasons(source) == [
        ("x.tar/link2.jpg", "is no plain file but a link to /etc/passwd"),
        ("x.tar/hard3.jpg", "is no plain file but a link to ../../up0.jpg"),
        ("x.tar/dev4.jpg", "is no plain file but a device or pipe"),
        ("x.tar/pipe5.jpg", "is no plain file but a device or pipe"),
        ("x.tar/odd6.jpg", "is no plain file but of the type b'Z'"),
    ]
    assert os.listdir(tmp_path) == ["x.tar"]


def test_ambiguous_samples_have_reasons(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "x.tar",
        *make_samples("a0", "b1", "a0"),
        *[("c.left.png", b"l"), ("c.right.png", b"r"), ("c.cls", b"2")],
        *[("d.png", b"d"), ("d.cls", b"0"), ("d.cls", b"1")],
        *[("e.cls", b"1"), ("f.jpg", b"f"), ("__metadata__.json", b"{}")],
    )
    source = open_archives(tmp_path)
    assert list_reasons(source) == [
        ("x.tar/a0.jpg", "is a second image of its sample"),
        ("x.tar/c.right.png", "is a second image of its sample"),
        ("x.tar/d.png", "the sample has two labels"),
        ("x.tar/e.cls", "the sample has no image"),
    ]
    found = {record.path: record.label for record in read_split(source) if record.data}
    assert found == {"x.tar/a0.jpg": 0, "x.tar/b1.jpg": 1, "x.tar/c.left.png": 2, "x.tar/f.jpg": -1}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_damage_costs_following_members(tmp_path: Path, suffix: str) -> None:
    plain = write_shard(tmp_path / "whole.tar", *make_samples("a0", "b1", "c2")).read_bytes()
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
    write_shard(tmp_path / "a.tar", *make_samples("z0"))
    for what, (data, whole) in damage.items():
        (tmp_path / f"b{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        records = read_split(open_archives(tmp_path))
        assert [record.data for record in records if record.reason is None] == [b"z0", b"a0", b"b1"][: 1 + whole], what
        assert [record.path for record in records if record.reason is not None] == [f"b{suffix}"], what
        assert str(records[-1].reason).startswith("the archive is damaged, what follows is lost: "), what


@pytest.mark.fault(53, "a header of gigabytes")
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_too_large_header_is_damage(tmp_path: Path, kind: bytes) -> None:
    header = make_special_member("x", kind)
    header.size = 8**11 - 1
    file = write_shard(tmp_path / "a.tar", *make_samples("0001"))
    file.write_bytes(
        file.read_bytes()[: 4 * tarfile.BLOCKSIZE] + header.tobuf(tarfile.GNU_FORMAT) + bytes(4 * tarfile.BLOCKSIZE)
    )
    assert list_reasons(open_archives(tmp_path)) == [
        ("a.tar", "the archive is damaged, what follows is lost: a header of 8589934591 bytes (at most 1048576)")
    ]


@pytest.mark.fault(53, "headers without end")
def test_endless_headers_are_damage(tmp_path: Path) -> None:
    name = make_special_member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    name.size = 4
    file = write_shard(tmp_path / "a.tar", *make_samples("0001"))
    endless = (name.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(tarfile.BLOCKSIZE, b"\0")) * 3_000
    file.write_bytes(file.read_bytes()[: 4 * tarfile.BLOCKSIZE] + endless)
    ((path, reason),) = list_reasons(open_archives(tmp_path))
    assert path == "a.tar"
    assert reason.startswith("the archive is damaged, what follows is lost: maximum recursion depth")


@pytest.mark.fault(53, "a member of gigabytes")
def test_too_large_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 4)
    write_shard(tmp_path / "a.tar", ("1.jpg", b"four"), ("2.jpg", b"fives"))
    assert [(record.path, record.data) for record in read_split(open_archives(tmp_path))] == [
        ("a.tar/1.jpg", b"four"),
        ("a.tar/2.jpg", None),
    ]
