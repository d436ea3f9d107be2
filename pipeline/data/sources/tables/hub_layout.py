"""The Parquet files of a data set on a hub: its configurations and splits, as its card or its folders name them."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from firstlight.pipeline.data.sources.conventions.split_names import (
    SPLITS,
    describe_split_names,
    find_value_splits,
    parse_split_name,
)
from firstlight.pipeline.data.sources.files import Files
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.data.sources.source_splits import FileSplits, split_files
from firstlight.pipeline.data.sources.tables.hub_address import HubAddress
from firstlight.pipeline.errors import UserError, one_line, suggest_valid

HUB_CARD_FILE = "README.md"
# The head of a card is read up to here
MAX_READ_CARD_BYTES = 1 << 20
CARD_HEAD = re.compile(r"\A---[^\S\n]*\n(.*?)\n---[^\S\n]*(?:\n|\Z)", re.DOTALL)
# Split -> patterns of files, by the name of a configuration
CardConfigs = dict[str, dict[str, tuple[str, ...]]]


def choose_hub_files(files: Files, names: Sequence[str], address: HubAddress, dataset: SourceOptions) -> FileSplits:
    """Returns the Parquet files of each split, of the configuration and split that the address names.

    `names`: all Parquet files. Splits that the card names count as they are called there; others by the names of
    files. If the address names a split, its images are those to train on.

    Raises:
        UserError: there is no such configuration or split, or several configurations and none is named.
    """
    root = repr(str(dataset.root))
    configs = read_card_configs(files)
    if configs:
        splits = _match_patterns(names, configs[_choose_config(configs, address.config, root)], root)
    else:
        splits = _group_by_split(_keep_config_folder(names, address.config, root))
    if address.split is not None:
        if address.split not in splits:
            raise UserError(f"dataset.root: {root}: there is no split {address.split!r}; {_name_splits(splits)}")
        return FileSplits({"train": splits[address.split], "val": [], "test": []}, [], ())
    kept = [name for found in splits.values() for name in found]
    if not configs or dataset.splits is not None:
        return split_files(kept, dataset, root)
    return _map_splits(splits, root)


def read_card_configs(files: Files) -> CardConfigs:
    """Returns the configurations that the head of the card lists, the default first; {} if it lists none."""
    if not files.exists(HUB_CARD_FILE):
        return {}
    with files.open(HUB_CARD_FILE) as opened:
        text = opened.read(MAX_READ_CARD_BYTES).decode("utf-8", "replace")
    head = CARD_HEAD.match(text.replace("\r\n", "\n"))
    try:
        listed = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"dataset.root: {files.get_location(HUB_CARD_FILE)}: its head is no YAML: {one_line(error)}"
        ) from None
    entries = listed.get("configs") if isinstance(listed, dict) else None
    found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    found.sort(key=lambda entry: entry.get("default") is not True)
    configs = {str(entry.get("config_name", "default")): _read_patterns(entry.get("data_files")) for entry in found}
    return {name: patterns for name, patterns in configs.items() if patterns}


def _read_patterns(data_files: Any) -> dict[str, tuple[str, ...]]:
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if isinstance(data_files, str) or (
        isinstance(data_files, list) and all(isinstance(entry, str) for entry in data_files)
    ):
        return {"train": _list_texts(data_files)} if data_files else {}
    entries = data_files if isinstance(data_files, list) else []
    found = {
        str(entry.get("split", "train")): _list_texts(entry.get("path")) for entry in entries if isinstance(entry, dict)
    }
    return {split: patterns for split, patterns in found.items() if patterns}


def _list_texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str))


def _choose_config(configs: CardConfigs, wanted: str | None, root: str) -> str:
    if wanted is None:
        first = next(iter(configs))
        if len(configs) == 1 or "default" in configs:
            return "default" if "default" in configs else first
        raise UserError(f"dataset.root: {root} has several configurations; valid: {_name_configs(configs)}")
    if wanted not in configs:
        raise UserError(f"dataset.root: {root}: no configuration {wanted!r}; {suggest_valid(wanted, configs)}")
    return wanted


def _name_configs(configs: Sequence[str] | CardConfigs) -> str:
    return ", ".join(f"?config={name}" for name in list(configs)[:20])


def _match_patterns(names: Sequence[str], patterns: Mapping[str, tuple[str, ...]], root: str) -> dict[str, list[str]]:
    found = {
        split: [name for name in names if any(_matches(name, pattern) for pattern in ones)]
        for split, ones in patterns.items()
    }
    if not any(found.values()):
        listed = ", ".join(pattern for ones in patterns.values() for pattern in ones)
        raise UserError(f"dataset.root: {root}: no Parquet file is among those that the card names: {listed[:200]}")
    return {split: ones for split, ones in found.items() if ones}


def _matches(name: str, pattern: str) -> bool:
    plain = pattern.removeprefix("./")
    return fnmatch.fnmatchcase(name, plain) or fnmatch.fnmatchcase(name, plain.replace("**/", ""))


def _keep_config_folder(names: Sequence[str], wanted: str | None, root: str) -> list[str]:
    """Returns the files below the folder of a configuration, as push_to_hub and the hub's own conversion write it."""
    folders = {name.partition("/")[0]: None for name in names if "/" in name}
    configs = [folder for folder in folders if parse_split_name(folder) is None and folder != "data"]
    if wanted is not None:
        if wanted not in configs:
            valid = suggest_valid(wanted, configs) if configs else "valid: none, it has one configuration only"
            raise UserError(f"dataset.root: {root}: no configuration {wanted!r}; {valid}")
        return [name for name in names if name.startswith(f"{wanted}/")]
    if len(configs) > 1 and all(name.partition("/")[0] in configs for name in names):
        raise UserError(f"dataset.root: {root} has several configurations; valid: {_name_configs(configs)}")
    return list(names)


def _group_by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the files by split: train-00000-of-00002.parquet, and train/0000.parquet as the hub converts."""
    found: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        stem = re.sub(r"(-\d+)?(-of-\d+)?(-[0-9a-f]{16})?\.parquet\Z", "", file, flags=re.IGNORECASE)
        split = stem if stem and not stem.isdigit() else folder.rpartition("/")[2] or "train"
        found.setdefault(split, []).append(name)
    return found


def _map_splits(splits: Mapping[str, list[str]], root: str) -> FileSplits:
    """Returns the files by what the names of splits stand for. The only split is for training, whatever its name."""
    meant = find_value_splits(splits)
    if len(splits) == 1:
        meant = dict.fromkeys(splits, "train")
    if "train" not in meant.values():
        raise UserError(f"dataset.root: {root}: no split is named for training; {_name_splits(splits)}")
    groups = {kind: [name for split in splits if meant.get(split) == kind for name in splits[split]] for kind in SPLITS}
    others = [name for split, found in splits.items() if split not in meant for name in found]
    return FileSplits(groups, others, (describe_split_names(meant),) if len(meant) > 1 else ())


def _name_splits(splits: Mapping[str, list[str]]) -> str:
    return f"valid: {', '.join(f'?split={name}' for name in list(splits)[:20])}"
