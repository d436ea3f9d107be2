"""Archives in the layout of WebDataset."""

import io
import tarfile
from pathlib import Path

Member = tuple[str, bytes] | tarfile.TarInfo


def write_shard(file: Path, *members: Member) -> Path:
    """Writes an archive of names and contents, and of members that are no files."""
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


def make_samples(*keys: str) -> list[Member]:
    """Images whose contents are their keys, labelled by the number in the key."""
    return [member for key in keys for member in ((f"{key}.jpg", key.encode()), (f"{key}.cls", key[-1].encode()))]


def make_special_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
