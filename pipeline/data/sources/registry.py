"""The sources by name. No module outside of this package knows the layout of a source.

A source lists its images when it is opened (paths and labels, no pixels). It is then read in parts, each by its own
task. To add one, write a module with a subclass of `Source` and a function that opens it, and add the function to
`SOURCES`.
"""

import os
from collections.abc import Callable
from dataclasses import replace

from firstlight.pipeline.data.sources.download import download_dataset
from firstlight.pipeline.data.sources.files import decode_path
from firstlight.pipeline.data.sources.folder import open_folder
from firstlight.pipeline.data.sources.identity import identify_source
from firstlight.pipeline.data.sources.list import open_list
from firstlight.pipeline.data.sources.packaged.digits import open_digits
from firstlight.pipeline.data.sources.packaged.mnist_5k import open_mnist_5k
from firstlight.pipeline.data.sources.parquet import open_parquet
from firstlight.pipeline.data.sources.published.cifar import open_cifar10, open_cifar100
from firstlight.pipeline.data.sources.published.cub import open_cub200
from firstlight.pipeline.data.sources.published.dogs import open_stanford_dogs
from firstlight.pipeline.data.sources.published.imagenet import open_imagenet
from firstlight.pipeline.data.sources.published.mnist import open_idx
from firstlight.pipeline.data.sources.published.stl10 import open_stl10
from firstlight.pipeline.data.sources.published.svhn import open_svhn
from firstlight.pipeline.data.sources.published.voc import open_voc
from firstlight.pipeline.data.sources.source import Source, SourceOptions, describe_listing
from firstlight.pipeline.data.sources.tables.hugging_face import open_hugging_face
from firstlight.pipeline.data.sources.webdataset import open_webdataset
from firstlight.pipeline.errors import UserError, describe_os_error
from firstlight.tasks.extensions.registry import Registry

_OWN_SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "digits": open_digits,
    "mnist_5k": open_mnist_5k,
    "folder": open_folder,
    "list": open_list,
    "parquet": open_parquet,
    "hugging_face": open_hugging_face,
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
SOURCES = Registry("sources", _OWN_SOURCES)


def open_source(dataset: SourceOptions) -> Source:
    """Lists the images of `dataset` without reading them.

    If the source has no test split, `test_fraction` of each class becomes it.

    Raises:
        UserError: `dataset.root`, a column or a file is missing, cannot be read, or does not hold what the config says;
            or the download failed, see `download_dataset`.
    """
    try:
        if dataset.download:
            download_dataset(dataset)
        source = identify_source(SOURCES[dataset.source](dataset), dataset)
        return source if source.reading else replace(source, reading=describe_listing(source))
    except OSError as error:
        where = decode_path(os.fsencode(error.filename or str(dataset.root)))
        raise UserError(f"dataset.root: {where}: cannot be read: {describe_os_error(error)}") from None
