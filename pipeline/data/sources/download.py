"""Published sets, fetched into `dataset.root` by torchvision (`dataset.download: true`), each archive checked against the md5 that is known of it.

A set is fetched and unpacked in a folder of its own and then moved to its place, so that what is there is whole; what was fetched before a
failure is not fetched again.
"""

import contextlib
import http.client
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from firstlight.pipeline.data.sources.files import local_path
from firstlight.pipeline.errors import UserError, suggest_valid

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

WORK = ".download"  # below the root, until a set is whole
TIMEOUT = 10  # seconds without an answer
CIFAR = "https://www.cs.toronto.edu/~kriz/"  # torchvision knows the Python version, whose files are pickles
FAILED = (
    OSError,
    RuntimeError,
    ValueError,
    http.client.HTTPException,
)  # no network, another md5, a URL that turns in circles


class Remote(NamedTuple):
    """A file to fetch, from the first of `urls` that has it."""

    urls: tuple[str, ...]
    md5: str

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]


class Set(NamedTuple):
    """A set by what is fetched, and by where it is then. `folder`: what archives unpack to; None: the files are read as they are."""

    files: tuple[Remote, ...]
    folder: str | None
    mark: str | None = None  # a name within `folder`, by which a root that is that folder itself is known


def published(dataset: "Dataset") -> Set:
    """What is known of the set that `dataset` names.

    Raises:
        UserError: nothing is; the names of those that are known are given.
    """
    from torchvision.datasets import MNIST, STL10, SVHN  # only the driver fetches: no decoding task needs torch
    from torchvision.datasets.voc import DATASET_YEAR_DICT as VOC

    known = {
        "cifar10": Set(
            (Remote((f"{CIFAR}cifar-10-binary.tar.gz",), "c32a1d4ab5d03f1284b67883e8d87530"),),
            "cifar-10-batches-bin",
            "test_batch.bin",
        ),
        "cifar100": Set(
            (Remote((f"{CIFAR}cifar-100-binary.tar.gz",), "03b5dce01913d631647c71ecec9e9cb8"),),
            "cifar-100-binary",
            "test.bin",
        ),
        "stl10": Set((Remote((STL10.url,), STL10.tgz_md5),), "stl10_binary", "train_X.bin"),
        "svhn": Set(
            tuple(Remote((url,), md5) for url, _, md5 in (SVHN.split_list[split] for split in ("train", "test"))), None
        ),
        "mnist": Set(
            tuple(Remote(tuple(mirror + name for mirror in MNIST.mirrors), md5) for name, md5 in MNIST.resources), None
        ),
        "voc2007": Set(
            tuple(Remote((VOC[k]["url"],), VOC[k]["md5"]) for k in ("2007", "2007-test")),
            "VOCdevkit/VOC2007",
            "JPEGImages",
        ),
        "voc2012": Set((Remote((VOC["2012"]["url"],), VOC["2012"]["md5"]),), "VOCdevkit/VOC2012", "JPEGImages"),
    }
    name = dataset.source if dataset.source in known else dataset.name
    if name not in known or dataset.source not in (
        name,
        {"mnist": "idx", "voc2007": "voc", "voc2012": "voc"}.get(name),
    ):
        raise UserError(
            f"dataset.download: is not known for dataset.name {dataset.name!r} with source {dataset.source!r}; {suggest_valid(name, known)}"
        )
    return known[name]


def fetch(dataset: "Dataset") -> None:
    """The set that `dataset` names is below `dataset.root` afterwards; nothing is fetched of what is there.

    Raises:
        UserError: it is not known, the root is not on disk or cannot be written, there is no network, or what came is not the published file.
    """
    found, root = published(dataset), local_path(dataset.root or "")
    if root is None:
        raise UserError(
            f"dataset.download: true is not valid with dataset.root {dataset.root!r}; valid: a folder on disk"
        )
    work = root / WORK
    if found.folder is None:
        missing = [
            file
            for file in found.files
            if not (root / file.name).exists() and not (root / file.name.removesuffix(".gz")).exists()
        ]
    else:
        last = found.folder.rpartition("/")[2]
        missing = (
            []
            if any((root / name).exists() for name in (found.folder, last, found.mark) if name)
            else list(found.files)
        )
    if not missing:
        return
    for file in missing:
        _get(file, work)
    _unpack(found.folder, missing, work) if found.folder else None
    for name in [found.folder] if found.folder else [file.name for file in missing]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / ("unpacked" if found.folder else "") / name, root / name)
    shutil.rmtree(work, ignore_errors=True)


def _get(file: Remote, work: Path) -> None:
    """Into `work`, unless it is there already, whole."""
    from torchvision.datasets.utils import download_url

    told = []
    for url in file.urls:
        try:
            with _impatient():
                download_url(url, work, file.name, file.md5)
            return
        except FAILED as error:
            told.append(f"{url}: {_reason(error, file)}")
    (work / file.name).unlink(missing_ok=True)
    raise UserError(
        f"dataset.download: {'; '.join(told)}; valid: a network that leads there, or false, with the set unpacked in dataset.root"
    )


def _reason(error: BaseException, file: Remote) -> str:
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        return f"what came is not the published file, whose md5 is {file.md5}"
    cause = getattr(error, "reason", None) or error
    return " ".join((getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).split())[:200]


def _unpack(folder: str, files: list[Remote], work: Path) -> None:
    """All archives into one folder, anew."""
    from torchvision.datasets.utils import extract_archive

    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    for file in files:
        extract_archive(work / file.name, unpacked)
    if not (unpacked / folder).is_dir():
        raise UserError(f"dataset.download: {', '.join(file.name for file in files)} do not hold {folder!r}")


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """A server that does not answer is given up: torchvision would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
