"""Files of a commit on a hub: their listing, their reading, and what is missing."""

import builtins
from collections.abc import Iterator
from typing import Any

import pytest

from firstlight.pipeline.data.sources.tables.hub_address import parse_hub_address
from firstlight.pipeline.data.sources.tables.hub_files import HubFiles, open_hub_files
from firstlight.pipeline.errors import UserError
from tests.support.dataset_hub import COMMIT, OTHER_COMMIT, DatasetHub, serve_datasets


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    with serve_datasets(monkeypatch) as served:
        served.files = {
            COMMIT: {"README.md": b"# Photos", "data/a.bin": bytes(range(256)), ".gitattributes": b"x"},
            OTHER_COMMIT: {"README.md": b"# Photos"},
        }
        yield served


def open_address(root: str) -> tuple[Any, str]:
    return open_hub_files(parse_hub_address(root), root)


def test_files_of_the_commit_of_a_revision(hub: DatasetHub) -> None:
    files, commit = open_address("hf://owner/photos")
    assert isinstance(files, HubFiles)
    assert (commit, files.root) == (COMMIT, f"hf://datasets/owner/photos@{COMMIT}")
    assert files.list_tree() == ["README.md", "data/a.bin"]
    assert files.list_names() == ["README.md"]
    assert files.exists("data/a.bin")
    assert not files.exists("data/b.bin")
    hub.revisions["main"] = OTHER_COMMIT
    with files.open("data/a.bin") as opened:
        opened.seek(250)
        assert opened.read() == bytes(range(250, 256)), "the commit stays that of the listing"
    assert files.read_part(b"data/a.bin", 3, 4) == bytes(range(3, 7))
    other, commit = open_address("hf://owner/photos@old")
    assert commit == OTHER_COMMIT
    assert other.get_facts("README.md") == files.get_facts("README.md"), "same content, same version"
    with pytest.raises(FileNotFoundError):
        other.get_facts("data/a.bin")


def test_missing_data_set_and_revision_are_named(hub: DatasetHub) -> None:
    with pytest.raises(UserError) as error:
        open_address("hf://owner/none")
    assert str(error.value) == (
        f"dataset.root: 'hf://owner/none': {hub.address} has no data set owner/none, or it is private or gated; "
        "valid: a public one, or HF_TOKEN in the environment"
    )
    with pytest.raises(UserError, match=r"^dataset\.root: 'hf://owner/photos@v9': owner/photos has no revision 'v9'$"):
        open_address("hf://owner/photos@v9")


def test_hub_that_is_not_reached_is_named(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(
        UserError, match=r"^dataset\.root: 'hf://owner/photos' cannot be read from http://.*: no route$"
    ):
        open_address("hf://owner/photos")


def test_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"^dataset\.root: .* needs an extra: pip install 'firstlight\[hf\]'$"):
        open_address("hf://owner/photos")
