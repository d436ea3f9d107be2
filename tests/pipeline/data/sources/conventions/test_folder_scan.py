"""Images below a folder: by endings and bytes, what is left out and counted, and links."""

import os
from pathlib import Path

import fsspec

from firstlight.pipeline.data.sources.conventions.folder_scan import scan_folder, scan_remote
from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from tests.support.image_sources import make_png, write_named_files


def paths(images: list[tuple[bytes, int, int]]) -> list[str]:
    return sorted(path.decode() for path, _, _ in images)


def write_odd_files(root: Path) -> Path:
    """Writes images with odd endings, and files that are none."""
    write_named_files(root, "cat/1.jpg", "__MACOSX/cat/1.jpg", "__MACOSX/x", "$RECYCLE.BIN/2.jpg", "lost+found/3.png")
    write_named_files(root, "__pycache__/x.pyc", ".git/4.jpg", "cat/.5.jpg", "cat/Thumbs.db", "cat/a.txt", "cat/b.xml")
    for name in ("cat/6", "cat/7.jpg.1", "cat/8.jpg?w=300", "cat/9.image", "dog/10"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(make_png(1))
    write_named_files(root, "cat/notes", "cat/x.unknown")
    return root


def test_images_are_known_by_endings_or_bytes_and_the_rest_is_counted(tmp_path: Path) -> None:
    scan = scan_folder(LocalFiles(write_odd_files(tmp_path)))
    assert paths(scan.images) == ["cat/1.jpg", "cat/6", "cat/7.jpg.1", "cat/8.jpg?w=300", "cat/9.image", "dog/10"]
    assert scan.by_bytes == {"no ending": 2, ".1": 1, ".jpg?w=300": 1, ".image": 1}
    assert scan.left_out == {
        "hidden": 2,
        "in __MACOSX": 2,
        "in $RECYCLE.BIN": 1,
        "in lost+found": 1,
        "in __pycache__": 1,
        "of the system": 1,
        ".txt": 1,
        ".xml": 1,
        "no ending": 1,
        ".unknown": 1,
    }
    assert scan.describe_findings(False)[0].startswith(
        "5 images with other endings, or none, read by their bytes: no end"
    )


def test_remote_images_are_found_alike(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for file in write_odd_files(tmp_path).rglob("*"):
        if file.is_file():
            fs.pipe(f"/scan/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
    local, remote = scan_folder(LocalFiles(tmp_path)), scan_remote(RemoteFiles("memory://scan"))
    assert paths(remote.images) == paths(local.images)
    assert remote.by_bytes == local.by_bytes
    assert remote.left_out == {**local.left_out, "hidden": 2}
    assert {b"", b"cat", b"dog"} == remote.folders


def test_links_are_followed_only_if_asked_and_never_twice(tmp_path: Path) -> None:
    outside = write_named_files(tmp_path / "outside", "dog/1.jpg", "dog/deep/2.jpg", "file.jpg")
    root = write_named_files(tmp_path / "root", "cat/3.jpg")
    os.symlink(outside / "dog", root / "dog")
    os.symlink(root, root / "cat" / "round")
    os.symlink(root / "cat", root / "twin")
    os.symlink(outside / "file.jpg", root / "cat" / "4.jpg")
    scan = scan_folder(LocalFiles(root))
    assert paths(scan.images) == ["cat/3.jpg", "cat/4.jpg"]
    assert sorted(scan.folder_links) == [b"cat/round", b"dog", b"twin"]
    assert scan.outside_links == [b"cat/4.jpg"]
    scan = scan_folder(LocalFiles(root, follow_links=True))
    assert paths(scan.images) == ["cat/3.jpg", "cat/4.jpg", "dog/1.jpg", "dog/deep/2.jpg"]
    assert (sorted(scan.folder_links), scan.outside_links) == ([b"cat/round", b"twin"], [])
    assert scan.describe_findings(True) == [
        "left out, as they are links to folders: cat/round, twin; their folders are read already"
    ]


def test_pipe_without_ending_is_counted_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(write_named_files(tmp_path, "cat/1.jpg") / "cat" / "pipe")
    assert scan_folder(LocalFiles(tmp_path)).left_out == {"not readable": 1}
