"""The files of one commit of a data set on a Hugging Face hub: streamed from there, or in the cache of its library.

The library `huggingface_hub` is used as its environment says: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`. Files are
read as bytes; no code of a repository is run.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from firstlight.pipeline.data.sources.files import FileFacts, Files, LocalFiles
from firstlight.pipeline.data.sources.remote_files import RemoteFiles, parse_remote_facts
from firstlight.pipeline.data.sources.tables.hub_address import HubAddress
from firstlight.pipeline.errors import UserError, one_line


@dataclass(frozen=True)
class HubFiles(RemoteFiles):
    """The files of a commit, whose listing is known: name, size in bytes, and an id that changes with the content."""

    listing: tuple[tuple[str, int, str], ...]

    @cached_property
    def _facts(self) -> dict[str, FileFacts]:
        return {name: parse_remote_facts(name, {"size": size, "ETag": id}) for name, size, id in self.listing}

    def list_names(self) -> list[str]:
        return [name for name in self.list_tree() if "/" not in name]

    def list_tree(self) -> list[str]:
        return sorted(name for name in self._facts if not any(part.startswith(".") for part in name.split("/")))

    def list_all(self) -> list[FileFacts]:
        return list(self._facts.values())

    def get_facts(self, name: str) -> FileFacts:
        if name not in self._facts:
            raise FileNotFoundError(2, "No such file or directory", self.get_location(name))
        return self._facts[name]

    def exists(self, name: str) -> bool:
        return name in self._facts


def open_hub_files(address: HubAddress, root: str) -> tuple[Files, str]:
    """Returns the files of the commit that the revision of an address stands for now, and the id of the commit.

    `root`: the address as it is given. With `HF_HUB_OFFLINE`, the files are those in the cache on this machine.

    Raises:
        UserError: the library is missing, or the hub or its cache has no such data set or revision; names
            `dataset.root`.
    """
    try:
        from huggingface_hub import HfApi, constants, errors
        from huggingface_hub.hf_api import RepoFile
    except ImportError:
        raise UserError(f"dataset.root: {root!r} needs an extra: pip install 'firstlight[hf]'") from None

    if constants.HF_HUB_OFFLINE:
        return _open_cache(address, root)
    api = HfApi()
    try:
        commit = str(api.dataset_info(address.repo, revision=address.revision).sha)
        entries = api.list_repo_tree(address.repo, recursive=True, revision=commit, repo_type="dataset")
        # The sha256 of a large file, else the id of its content in Git
        listing = [
            (entry.path, int(entry.size), str(entry.lfs.sha256 if entry.lfs else entry.blob_id))
            for entry in entries
            if isinstance(entry, RepoFile)
        ]
    except errors.RevisionNotFoundError:
        raise UserError(f"dataset.root: {root!r}: {address.repo} has no revision {address.revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"dataset.root: {root!r}: {api.endpoint} has no data set {address.repo}, or it is private or gated; "
            "valid: a public one, or HF_TOKEN in the environment"
        ) from None
    # The clients of other versions raise other errors if there is no network.
    except Exception as error:
        raise UserError(f"dataset.root: {root!r} cannot be read from {api.endpoint}: {one_line(error)}") from None
    return HubFiles(f"hf://datasets/{address.repo}@{commit}", tuple(sorted(listing))), commit


def _open_cache(address: HubAddress, root: str) -> tuple[Files, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(address.repo, repo_type="dataset", revision=address.revision, local_files_only=True)
        )
    except Exception as error:
        advice = f"hf download --repo-type dataset {address.repo} puts it there"
        raise UserError(
            f"dataset.root: {root!r} is not in the cache, and HF_HUB_OFFLINE is set; {advice}: {one_line(error, 80)}"
        ) from None
    # The files of a snapshot are links to those of the cache.
    return LocalFiles(folder, follow_links=True), folder.name
