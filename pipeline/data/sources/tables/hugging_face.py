"""Data sets of Hugging Face: `hf://owner/name` on a hub, and folders that `save_to_disk` has written."""

from dataclasses import dataclass, replace

from firstlight.pipeline.data.sources.parquet import PARQUET_TABLES, ParquetSource, list_parquet_files
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.data.sources.tables.arrow_folder import open_arrow_folder
from firstlight.pipeline.data.sources.tables.hub_address import HUB_SCHEME, parse_hub_address
from firstlight.pipeline.data.sources.tables.hub_files import open_hub_files
from firstlight.pipeline.data.sources.tables.hub_layout import choose_hub_files
from firstlight.pipeline.data.sources.tables.table_rows import TableSource, open_tables
from firstlight.pipeline.errors import UserError


@dataclass(frozen=True)
class HubSource(ParquetSource):
    """Rows of the Parquet files of one commit of a data set on a hub."""

    kind = "hugging_face"


def open_hugging_face(dataset: SourceOptions) -> TableSource:
    """Lists the rows of a data set on a hub, or of a folder on disk.

    The store keeps the commit, in the first line of what was read.

    Raises:
        UserError: `dataset.root` is neither, the hub cannot be reached, the data set has no Parquet files or several
            configurations, or as `open_parquet`.
    """
    root = dataset.root or ""
    if not root.startswith(HUB_SCHEME):
        return open_arrow_folder(dataset)
    address = parse_hub_address(root)
    files, commit = open_hub_files(address, root)
    try:
        names = list_parquet_files(files)
    except UserError:
        raise UserError(
            f"dataset.root: {root!r} has no Parquet files; valid: hf://{address.repo}@refs/convert/parquet, where the "
            "hub keeps its own conversion, if it has made one"
        ) from None
    found = choose_hub_files(files, names, address, dataset)
    source = open_tables(dataset, files, found, replace(PARQUET_TABLES, source=HubSource))
    return replace(source, reading=(f"read commit {commit} of {root}", *source.reading))
