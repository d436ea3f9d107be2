"""Configurations and splits of data sets on a hub, by their card and by the names of their files."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.sources.source_splits import FileSplits
from firstlight.pipeline.data.sources.tables.hub_address import parse_hub_address
from firstlight.pipeline.data.sources.tables.hub_layout import choose_hub_files, read_card_configs
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options

CARD = """---
license: mit
configs:
- config_name: plain
  data_files:
  - split: train
    path: plain/train-*
  - split: validation
    path: [plain/val-*]
  - split: extra
    path: plain/extra-*
- config_name: small
  data_files: "**/small-*.parquet"
---
# Photos
"""
PLAIN = [f"plain/{name}.parquet" for name in ("train-0", "train-1", "val-0", "extra-0")]


def choose(folder: Path, names: list[str], query: str = "", **fields: Any) -> FileSplits:
    root = f"hf://owner/photos{query}"
    options = dataset_options(source="hugging_face", root=root, **fields)
    return choose_hub_files(LocalFiles(folder), names, parse_hub_address(root), options)


def test_card_names_the_files_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    names = [*PLAIN, "other/small-0.parquet"]
    found = choose(tmp_path, names, "?config=plain")
    assert found.splits == {"train": PLAIN[:2], "val": PLAIN[2:3], "test": []}
    assert found.others == PLAIN[3:]
    assert choose(tmp_path, names, "?config=small").splits["train"] == ["other/small-0.parquet"]
    assert choose(tmp_path, names, "?config=plain&split=extra").splits["train"] == PLAIN[3:]
    by_pattern = choose(tmp_path, names, "?config=plain", splits={"train": ("*extra*",), "test": ("*val*",)})
    assert by_pattern.splits == {"train": PLAIN[3:], "val": [], "test": PLAIN[2:3]}


def test_configuration_that_is_the_default_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.replace("config_name: plain", "config_name: default"))
    assert choose(tmp_path, PLAIN).splits["train"] == PLAIN[:2]


def test_several_configurations_must_be_chosen_from(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(UserError, match=r"several configurations; valid: \?config=plain, \?config=small$"):
        choose(tmp_path, PLAIN)
    with pytest.raises(UserError, match=r"no configuration 'plane'; did you mean 'plain'"):
        choose(tmp_path, PLAIN, "?config=plane")
    with pytest.raises(UserError, match=r"no split 'test'; valid: \?split=train, \?split=validation, \?split=extra$"):
        choose(tmp_path, PLAIN, "?config=plain&split=test")
    with pytest.raises(UserError, match="no Parquet file is among those that the card names: "):
        choose(tmp_path, PLAIN, "?config=small")


def test_files_without_a_card_count_by_their_names(tmp_path: Path) -> None:
    names = [f"data/{name}.parquet" for name in ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")]
    assert choose(tmp_path, names).splits == {"train": names[1:], "val": [], "test": names[:1]}
    assert choose(tmp_path, names, "?split=test").splits["train"] == names[:1]


def test_folders_of_the_conversion_by_the_hub_are_configurations(tmp_path: Path) -> None:
    names = ["a/test/0000.parquet", "a/train/0000.parquet", "b/train/0000.parquet"]
    found = choose(tmp_path, names, "@refs/convert/parquet?config=a")
    assert found.splits == {"train": names[1:2], "val": [], "test": names[:1]}
    assert choose(tmp_path, names, "?config=a&split=test").splits["train"] == names[:1]
    with pytest.raises(UserError, match=r"several configurations; valid: \?config=a, \?config=b$"):
        choose(tmp_path, names)


@pytest.mark.parametrize("head", ["", "---\n- a\n---\n", "---\nconfigs: 3\n---\n", "---\nconfigs: [{}, 4]\n---\n"])
def test_card_without_configurations(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"{head}# Photos\n")
    assert read_card_configs(LocalFiles(tmp_path)) == {}


def test_head_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n!!python/object/apply:os.getcwd []\n---\n")
    with pytest.raises(UserError, match=r"README\.md: its head is no YAML"):
        read_card_configs(LocalFiles(tmp_path))
