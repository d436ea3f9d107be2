"""Names of archives with braces and `::`, on disk and at URIs."""

from pathlib import Path

import pytest

from firstlight.pipeline.data.sources.conventions.archive_names import expand_archive_names, find_archives
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options
from tests.support.webdataset_shards import make_samples, write_shard


@pytest.mark.parametrize(
    ("root", "names"),
    [
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("a-{0..4..2}.tar", ["a-0.tar", "a-2.tar", "a-4.tar"]),
        ("{train,val}-{0..1}.tar", ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]),
        ("a-{0..2,7}.tar", ["a-0.tar", "a-1.tar", "a-2.tar", "a-7.tar"]),
        ("{a,b{1,2}}.tar", ["a.tar", "b1.tar", "a.tar", "b2.tar"]),
        ("a-{a..c}.tar", ["a-a.tar", "a-b.tar", "a-c.tar"]),
        ("a-{x}.tar", ["a-{x}.tar"]),
        ("s3://b/{x,y}/0.tar::s3://b/z.tar", ["s3://b/x/0.tar", "s3://b/y/0.tar", "s3://b/z.tar"]),
    ],
)
def test_braces_stand_for_names(root: str, names: list[str]) -> None:
    assert set(expand_archive_names(root)) == set(names)
    assert expand_archive_names(root)[0] == names[0]


@pytest.mark.parametrize(
    ("root", "text"),
    [
        ("a-{9..8}.tar", r"'\{9\.\.8\}' is no range"),
        ("a-{0..9999999999}.tar", "is no range of 1 to"),
        ("{0..99999}-{0..99999}.tar", "stands for more than 1,000,000 archives"),
        ("pipe:curl http://x/a.tar", "'pipe:' would run a command"),
    ],
)
def test_invalid_names_raise(root: str, text: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.root: .*{text}"):
        expand_archive_names(root)


def test_archives_of_several_folders_are_below_the_common_one(tmp_path: Path) -> None:
    for name in ("a/x-0.tar", "a/x-1.tar", "b/x-0.tar", "b/deep/x-2.tar"):
        write_shard(tmp_path / name, *make_samples("0001"))

    def find(root: str) -> list[str]:
        return find_archives(dataset_options(source="webdataset", root=f"{tmp_path}/{root}"))[1]

    assert find("{a,b}/x-0.tar") == ["a/x-0.tar", "b/x-0.tar"]
    assert find(f"a/x-1.tar::{tmp_path}/b/x-0.tar") == ["a/x-1.tar", "b/x-0.tar"]
    assert find("a/x-{0,1}.tar") == ["x-0.tar", "x-1.tar"]
    assert find("b/deep") == ["x-2.tar"]
    assert find("") == ["a/x-0.tar", "a/x-1.tar", "b/deep/x-2.tar", "b/x-0.tar"]
    with pytest.raises(UserError, match="have no folder in common"):
        find_archives(dataset_options(source="webdataset", root="memory://a/0.tar::file:///b/1.tar"))
