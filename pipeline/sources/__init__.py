"""Where images come from, one layout a file. No other part of Firstlight knows how a source is laid out.

A source lists itself when it is opened (paths and labels, never pixels), and is then read in parts, each by a task of its own. A new one is a
file with a `Source` and a function that opens it, and a line in `SOURCES`.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.sources.cifar import open_cifar10, open_cifar100
from pipeline.sources.cub import open_cub200
from pipeline.sources.digits import open_digits
from pipeline.sources.dogs import open_stanford_dogs
from pipeline.sources.download import fetch
from pipeline.sources.folder import open_folder
from pipeline.sources.idx import open_idx
from pipeline.sources.imagenet import open_imagenet
from pipeline.sources.list import open_list
from pipeline.sources.parquet import open_parquet
from pipeline.sources.source import Part, Record, Source, text
from pipeline.sources.stl10 import open_stl10
from pipeline.sources.svhn import open_svhn
from pipeline.sources.voc import open_voc
from pipeline.sources.webdataset import open_webdataset

if TYPE_CHECKING:
    from pipeline.config import Dataset  # its methods and tasks bring torch, which no reading task needs

__all__ = ["SOURCES", "Part", "Record", "Source", "open_source"]

SOURCES: dict[str, Callable[["Dataset"], Source]] = {
    "digits": open_digits,
    "folder": open_folder,
    "list": open_list,
    "parquet": open_parquet,
    "webdataset": open_webdataset,
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
    "cub200": open_cub200,
    "stanford_dogs": open_stanford_dogs,
    "idx": open_idx,
    "imagenet": open_imagenet,
    "stl10": open_stl10,
    "svhn": open_svhn,
    "voc": open_voc,
}


def open_source(dataset: "Dataset") -> Source:
    """List the images of `dataset`, without reading them. Where the source has no test split, `test_fraction` of each class becomes it.

    Raises:
        UserError: naming `dataset.root`, a column or a file that is missing, cannot be read, or does not hold what the config says; `fetch`.
    """
    try:
        if dataset.download:
            fetch(dataset)
        return SOURCES[dataset.source](dataset)
    except OSError as error:
        where = text(os.fsencode(error.filename or str(dataset.root)))
        raise UserError(f"dataset.root: {where}: cannot be read: {error.strerror or ' '.join(str(error).split())}") from None
