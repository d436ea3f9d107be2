"""Files below a folder on disk, and paths."""

import os
import threading
import time
from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import files, open_source
from firstlight.pipeline.data.sources.files import (
    decode_path,
    hash_facts,
    is_below,
    parse_local_path,
    read_concurrently,
    read_many,
)
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, write_named_files


def test_location_is_parsed_as_path_or_uri(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    assert parse_local_path("a//b/../c") == Path.cwd() / "a" / "c"
    assert parse_local_path("~/x") == Path.home() / "x"
    assert parse_local_path((tmp_path / "a b").as_uri()) == tmp_path / "a b"
    assert {parse_local_path(root) for root in ("s3://bucket/x", "gs://bucket/x", "https://host/x", "memory://x")} == {
        None
    }
    assert dataset_options(source="folder", root="s3://bucket//x").root == "s3://bucket//x"
    assert dataset_options(source="folder", root="~/x").root == str(Path.home() / "x")
    with pytest.raises(
        UserError,
        match=r"^dataset\.root: 'ftp://host/x': ftp:// is unknown; valid: a path, or az://, file://, gs://, hf://, ",
    ):
        open_source(dataset_options(source="folder", root="ftp://host/x"))


def test_local_files_list_visible_files(tmp_path: Path) -> None:
    found = files.LocalFiles(write_named_files(tmp_path, "b.txt", "a.txt", ".hidden", "sub/c.txt"))
    assert found.list_names() == ["a.txt", "b.txt", "sub"]
    assert (found.exists("a.txt"), found.exists("c.txt")) == (True, False)
    assert found.get_facts("a.txt") == (b"a.txt", 5, (tmp_path / "a.txt").stat().st_mtime_ns)
    assert found.open("sub/c.txt").read() == found.open_arrow("sub/c.txt").read() == b"sub/c.txt"
    assert found.get_location("a.txt") == str(tmp_path / "a.txt")


def test_local_read_stays_below_root(tmp_path: Path) -> None:
    write_named_files(tmp_path, "root/1.jpg", "outside.jpg")
    os.symlink(tmp_path / "outside.jpg", tmp_path / "root" / "out.jpg")
    os.symlink("1.jpg", tmp_path / "root" / "in.jpg")
    os.mkfifo(tmp_path / "root" / "pipe.jpg")
    found = files.LocalFiles(tmp_path / "root")
    assert found.read(b"in.jpg") == b"root/1.jpg"
    for name, reason in (
        (b"out.jpg", "link leaves the root"),
        (b"../outside.jpg", "link leaves"),
        (b"pipe.jpg", "pipe"),
    ):
        with pytest.raises(OSError, match=reason):
            found.read(name)


def test_only_root_and_its_content_are_below_it(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "a")
    below = {
        name: is_below(root, os.path.join(os.fsencode(tmp_path), name)) for name in (b"a", b"a/b", b"ab", b"a/../b")
    }
    assert below == {b"a": True, b"a/b": True, b"ab": False, b"a/../b": False}


def test_concurrent_reads_keep_order_and_bound_memory() -> None:
    started: list[int] = []
    results = read_concurrently(lambda k: started.append(k) or k * k, range(50))
    assert next(results) == 0
    assert len(started) <= files.MAX_CONCURRENT_READS
    assert [0, *results] == [k * k for k in range(50)]


class Storage:
    """Numbers that are read at once, or after a wait. `readers`: the thread of each read, in order."""

    def __init__(self, wait: float) -> None:
        self.wait, self.readers, self.reading, self.most = wait, dict[int, threading.Thread](), 0, 0
        self.lock = threading.Lock()

    def read(self, k: int) -> int:
        with self.lock:
            self.reading += 1
            self.most = max(self.most, self.reading)
        self.readers[k] = threading.current_thread()
        if self.wait:
            time.sleep(self.wait)
        with self.lock:
            self.reading -= 1
        return k * k

    def count_own(self) -> int:
        """Returns how many of the reads were made by this thread."""
        return sum(reader is threading.current_thread() for reader in self.readers.values())


def test_files_in_memory_are_read_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine makes any read wait.
    monkeypatch.setattr(files, "NOTABLE_WAIT_S", 10.0)
    storage = Storage(0.0)
    assert list(read_many(storage.read, range(1000))) == [k * k for k in range(1000)]
    assert storage.count_own() == 1000


def test_files_that_must_be_waited_for_are_read_by_threads() -> None:
    storage = Storage(0.002)
    assert list(read_many(storage.read, range(2000))) == [k * k for k in range(2000)]
    assert storage.most == files.MAX_CONCURRENT_READS
    # One before each group of 1, 2, 4, 8 and then 16 rounds of 16 reads.
    assert storage.count_own() == 11


def test_threads_leave_the_reads_when_there_is_no_wait_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "NOTABLE_WAIT_S", 0.05)
    storage = Storage(0.1)
    results = read_many(storage.read, range(400))
    # One read as a trial and a round of threads, twice the rounds, and a trial.
    assert [next(results) for _ in range(1 + 16 + 1 + 32)] == [k * k for k in range(50)]
    storage.wait = 0.0
    assert list(results) == [k * k for k in range(50, 400)]
    assert storage.count_own() == 2 + 350


def test_reads_that_nobody_waits_for_any_more_leave_no_thread() -> None:
    before, storage = threading.active_count(), Storage(0.002)
    results = read_many(storage.read, range(100))
    assert [next(results), next(results)] == [0, 1]
    assert threading.active_count() > before
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_error_of_a_read_is_raised_in_its_place() -> None:
    def read(k: int) -> int:
        time.sleep(0.001)
        if k == 30:
            raise OSError("gone")
        return k

    results = read_many(read, range(100))
    assert [next(results) for _ in range(30)] == list(range(30))
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_hash_depends_on_each_fact() -> None:
    facts = [(b"a", 1, 2), (b"b", 3, 4)]
    others = [[(b"c", 1, 2), facts[1]], [(b"a", 9, 2), facts[1]], [(b"a", 1, 9), facts[1]], facts[:1], facts[::-1]]
    assert len({hash_facts(other) for other in [facts, *others]}) == 6
    assert hash_facts(iter(facts)) == hash_facts(facts)


def test_path_that_is_not_utf8_is_escaped() -> None:
    assert decode_path(b"caf\xe9/\xc3\xa9.jpg") == "caf\\udce9/\u00e9.jpg"
