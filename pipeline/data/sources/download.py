"""Downloads of published data sets into `dataset.root` (`dataset.download: true`).

The md5 of every file is checked. A set is downloaded and unpacked in a folder of its own, `DOWNLOAD_FOLDER`, and then
moved to its final path, so that a set in the root is complete. Files that were complete before a failure are not
downloaded again.
"""

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from firstlight.pipeline.data.sources.files import parse_local_path
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError, one_line, suggest_valid
from firstlight.pipeline.terminal import SafeConsole

# The folder below the root that holds the files until a set is complete
DOWNLOAD_FOLDER = ".download"
# Time without an answer after which a server is given up
DOWNLOAD_TIMEOUT_S = 10
DOWNLOAD_CHUNK_BYTES = 1 << 16
# No network, a URL that redirects in a circle, an answer that is no HTTP
DOWNLOAD_ERRORS = (OSError, ValueError, http.client.HTTPException)


class Download(NamedTuple):
    """A file and its md5. The first of `urls` that has the file is used."""

    urls: tuple[str, ...]
    md5: str

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]


class PublishedSet(NamedTuple):
    """The files of a published set, and where they are afterwards.

    `folder` is the folder that the archives unpack to; None: the files are read as they are. `marker` is a name within
    `folder`: a root that holds it is that folder itself.
    """

    files: tuple[Download, ...]
    folder: str | None
    marker: str | None = None


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/"


def _mnist_file(name: str, md5: str) -> Download:
    return Download(tuple(mirror + name for mirror in _MNIST), md5)


# URLs and md5 as torchvision has them; of CIFAR, torchvision has the Python version, whose files are pickles
PUBLISHED_SETS = {
    "cifar10": PublishedSet(
        (Download((f"{_CIFAR}cifar-10-binary.tar.gz",), "c32a1d4ab5d03f1284b67883e8d87530"),),
        "cifar-10-batches-bin",
        "test_batch.bin",
    ),
    "cifar100": PublishedSet(
        (Download((f"{_CIFAR}cifar-100-binary.tar.gz",), "03b5dce01913d631647c71ecec9e9cb8"),),
        "cifar-100-binary",
        "test.bin",
    ),
    "stl10": PublishedSet(
        (Download(("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",), "91f7769df0f17e558f3565bffb0c7dfb"),),
        "stl10_binary",
        "train_X.bin",
    ),
    "svhn": PublishedSet(
        (
            Download((f"{_SVHN}train_32x32.mat",), "e26dedcc434d2e4c54c9b2d4a06d8373"),
            Download((f"{_SVHN}test_32x32.mat",), "eb5a983be6a315427106f1b164d9cef3"),
        ),
        None,
    ),
    "mnist": PublishedSet(
        (
            _mnist_file("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            _mnist_file("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            _mnist_file("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            _mnist_file("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        None,
    ),
    "voc2007": PublishedSet(
        (
            Download((f"{_VOC}voc2007/VOCtrainval_06-Nov-2007.tar",), "c52e279531787c972589f7e41ab4ae64"),
            Download((f"{_VOC}voc2007/VOCtest_06-Nov-2007.tar",), "b6e924de25625d8de591ea690078ad9f"),
        ),
        "VOCdevkit/VOC2007",
        "JPEGImages",
    ),
    "voc2012": PublishedSet(
        (Download((f"{_VOC}voc2012/VOCtrainval_11-May-2012.tar",), "6cd6e144f989b92b3379bac3b3de84fd"),),
        "VOCdevkit/VOC2012",
        "JPEGImages",
    ),
}
# Sets whose source has another name than the set
_SET_SOURCES = {"mnist": "idx", "voc2007": "voc", "voc2012": "voc"}


def find_published_set(dataset: SourceOptions) -> PublishedSet:
    """Returns the set that `dataset` names, by its source or by its name.

    Raises:
        UserError: the set is not known; the message lists the known names.
    """
    name = dataset.source if dataset.source in PUBLISHED_SETS else dataset.name
    if name not in PUBLISHED_SETS or dataset.source not in (name, _SET_SOURCES.get(name)):
        raise UserError(
            f"dataset.download: is not known for dataset.name {dataset.name!r} with source {dataset.source!r}; "
            f"{suggest_valid(name, PUBLISHED_SETS)}"
        )
    return PUBLISHED_SETS[name]


def download_dataset(dataset: SourceOptions) -> None:
    """Downloads the set that `dataset` names into `dataset.root`, except for what the root already holds.

    Raises:
        UserError: the set is not known, the root is not on disk, there is no network, or a file has another md5.
        OSError: the root cannot be written.
    """
    published, root = find_published_set(dataset), parse_local_path(dataset.root or "")
    if root is None:
        raise UserError(
            f"dataset.download: true is not valid with dataset.root {dataset.root!r}; valid: a folder on disk"
        )
    missing = _missing_files(published, root)
    if not missing:
        return
    work = root / DOWNLOAD_FOLDER
    for file in missing:
        _download_file(file, work)
    unpacked = _unpack_archives(published.folder, missing, work) if published.folder else work
    for name in [published.folder] if published.folder else [file.name for file in missing]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unpacked / name, root / name)
    shutil.rmtree(work, ignore_errors=True)


def _missing_files(published: PublishedSet, root: Path) -> list[Download]:
    """Files that are not in `root`: neither themselves, nor decompressed, nor the folder that they unpack to."""
    if published.folder is None:
        names = {file: (file.name, file.name.removesuffix(".gz")) for file in published.files}
        return [file for file in published.files if not any((root / name).exists() for name in names[file])]
    last = published.folder.rpartition("/")[2]
    names_of_set = (published.folder, last, published.marker)
    return [] if any((root / name).exists() for name in names_of_set if name) else list(published.files)


def _download_file(file: Download, work: Path) -> None:
    """Downloads `file` into `work`, unless `work` holds it with the right md5.

    Raises:
        UserError: none of the URLs has it; the message has the reason for each.
    """
    work.mkdir(parents=True, exist_ok=True)
    if (work / file.name).is_file() and _md5(work / file.name) == file.md5:
        return
    failures = []
    for url in file.urls:
        partial = work / f"{file.name}.part"
        try:
            _copy_url(url, partial)
        except DOWNLOAD_ERRORS as error:
            failures.append(f"{url}: {_reason(error)}")
            continue
        if _md5(partial) == file.md5:
            os.replace(partial, work / file.name)
            return
        failures.append(f"{url}: the download is not the published file, whose md5 is {file.md5}")
    raise UserError(
        f"dataset.download: {'; '.join(failures)}; "
        "valid: a network that reaches it, or false, with the set unpacked in dataset.root"
    )


def _copy_url(url: str, path: Path) -> None:
    """Writes what `url` serves to `path`, with a progress bar on stderr."""
    if not url.startswith(("https://", "http://")):
        raise ValueError("is no http:// or https:// URL")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    request = urllib.request.Request(url, headers={"User-Agent": "firstlight"})  # noqa: S310 - the scheme is checked
    with (
        urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response,  # noqa: S310
        open(path, "wb") as file,
        Progress(*columns, console=SafeConsole(stderr=True)) as progress,
    ):
        task = progress.add_task(path.stem, total=response.length)
        while chunk := response.read(DOWNLOAD_CHUNK_BYTES):
            file.write(chunk)
            progress.advance(task, len(chunk))


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", None) or error
    return one_line(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)


def _unpack_archives(folder: str, files: list[Download], work: Path) -> Path:
    """Unpacks all archives into one new folder below `work`, and returns it.

    Raises:
        UserError: the archives do not hold `folder`.
    """
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    for file in files:
        with tarfile.open(work / file.name) as archive:
            # The filter refuses members that would leave the folder.
            for member in archive:
                archive.extract(member, unpacked, filter="data")
    if not (unpacked / folder).is_dir():
        raise UserError(f"dataset.download: {', '.join(file.name for file in files)} do not hold {folder!r}")
    return unpacked
