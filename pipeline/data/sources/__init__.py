"""Where images come from, one layout a file. No other part of Firstlight knows how a source is laid out.

A source lists itself when it is opened (paths and labels, never pixels), and is then read in parts, each by a task of its own. A new one is a
file with a `Source` and a function that opens it, and a line in `SOURCES`.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from firstlight.pipeline.data.sources.digits import open_digits
from firstlight.pipeline.data.sources.download import fetch
from firstlight.pipeline.data.sources.folder import open_folder
from firstlight.pipeline.data.sources.list import open_list
from firstlight.pipeline.data.sources.parquet import open_parquet
from firstlight.pipeline.data.sources.published.cifar import open_cifar10, open_cifar100
from firstlight.pipeline.data.sources.published.cub import open_cub200
from firstlight.pipeline.data.sources.published.dogs import open_stanford_dogs
from firstlight.pipeline.data.sources.published.imagenet import open_imagenet
from firstlight.pipeline.data.sources.published.mnist import open_idx
from firstlight.pipeline.data.sources.published.stl10 import open_stl10
from firstlight.pipeline.data.sources.published.svhn import open_svhn
from firstlight.pipeline.data.sources.published.voc import open_voc
from firstlight.pipeline.data.sources.source import Part, Record, Source, text
from firstlight.pipeline.data.sources.webdataset import open_webdataset
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

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
        raise UserError(
            f"dataset.root: {where}: cannot be read: {error.strerror or ' '.join(str(error).split())}"
        ) from None
