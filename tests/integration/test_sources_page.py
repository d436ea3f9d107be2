"""docs/sources.md says what the code does: its keys, values, words, sources and names are those of the schema."""

import re
from typing import get_args

import pytest

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.dataset import READING_KEYS, DatasetOptions
from firstlight.pipeline.data.images.bad_image import BadImageKind
from firstlight.pipeline.data.manifest import STORE_SHAPE
from firstlight.pipeline.data.sources import SOURCES
from firstlight.pipeline.data.sources.conventions.archive_names import expand_braces
from firstlight.pipeline.data.sources.conventions.folder_layout import (
    ANNOTATION_FOLDERS,
    IMAGE_FOLDERS,
    SYSTEM_FOLDERS,
    UNLABELLED_FOLDERS,
)
from firstlight.pipeline.data.sources.conventions.split_names import find_split_names, parse_split_name
from firstlight.pipeline.data.sources.labels import MISSING_LABELS
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "sources.md").read_text()
SPANS = [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", PAGE)]
# dataset.key, dataset.key=value
STATED = [word for span in SPANS for word in re.split(r" (?=dataset\.)", span) if word.startswith("dataset.")]
WITH_VALUES = sorted({word for word in STATED if "=" in word and "..." not in word})
# Keys of how images are found and decoded, which the page has to explain.
READ_KEYS = {
    *READING_KEYS,
    *("mask_values", "annotated_orientation", "annotations", "depth", "max_pixels", "fingerprint", "test_fraction"),
    *("val_fraction", "image_column", "label_column", "split_column"),
}


def read_table(first_heading: str) -> list[list[str]]:
    """Returns the cells of the rows of the table with this heading."""
    lines = PAGE.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"| {first_heading} |")) + 2
    end = next(k for k in range(start, len(lines) + 1) if k == len(lines) or not lines[k].startswith("|"))
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines[start:end]]


def test_every_key_is_one_of_the_section_dataset() -> None:
    keys = {word.removeprefix("dataset.").partition("=")[0] for word in STATED}
    assert keys <= set(DatasetOptions.model_fields)
    assert keys >= READ_KEYS, "a key of how images are read is not explained"


@pytest.mark.parametrize("word", WITH_VALUES)
def test_every_stated_value_is_valid(word: str) -> None:
    key, _, text = word.removeprefix("dataset.").partition("=")
    value = yaml_reader.parse_yaml(text, where=key)
    accepted = []
    for source in SOURCES:
        location = {} if source == "digits" else {"list": "/l.csv"} if source == "list" else {"root": "/data"}
        try:
            found = dataset_options(**{"source": source, **location, key: value})
        except (UserError, ValueError):
            continue
        accepted.append(getattr(found, key))
    assert accepted, f"no source takes {word}"


def test_mappings_of_splits_and_masks_are_valid() -> None:
    mappings = {span for span in SPANS if re.match(r"\{(train|background): ", span) and "..." not in span}
    assert mappings == {"{train: [0, 1, 2], test: [3]}", "{background: 0, cell: 1, void: 255}"}
    splits, masks = (yaml_reader.parse_yaml(text, where="x") for text in sorted(mappings, reverse=True))
    found = dataset_options(source="list", list="/l.csv", splits=splits).splits
    assert found == {"train": ("0", "1", "2"), "test": ("3",)}
    found = dataset_options(source="voc", root="/data", mask_values=masks).mask_values
    assert found == {"background": (0,), "cell": (1,), "void": (255,)}


def test_every_source_has_its_place() -> None:
    headings = set(re.findall(r"^## `(\w+)`$", PAGE, re.MULTILINE))
    assert headings == {"folder", "hugging_face", "list", "parquet", "webdataset"}
    published = PAGE.partition("## Published sets")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", published)) == SOURCES.keys() - headings


def test_words_of_splits_are_those_that_are_read() -> None:
    for names, meaning in read_table("named"):
        for name in re.findall(r"`([^`]+)`", names):
            found = parse_split_name(name)
            assert found is not None, name
            assert not found.rest
            title = {"train": "training", "val": "held-out", "test": "test", "eval": "test"}[found.split]
            assert title in meaning, name
    sentence = PAGE.partition("Case, a year, and words")[2].partition("\n\n")[0]
    alone, paired = sentence.partition("Another word")[::2]
    for name in re.findall(r"`([^`]+)`", alone):
        assert find_split_names([name]) or name in ("set", "data", "images"), name
    assert set(find_split_names(["seg_train", "seg_test"])) <= set(re.findall(r"`([^`]+)`", paired))
    assert find_split_names(["crash_test", "other"]) == {}


def test_texts_without_a_label_are_those_that_are_read() -> None:
    row = next(cells for cells in read_table("found") if "`NaN`" in cells[0])
    named = {text.lower() for text in re.findall(r"`([^`]+)`", row[0])}
    assert named <= set(MISSING_LABELS)
    assert set(MISSING_LABELS) - named == {"#n/a", "-nan"}


def test_names_of_folders_are_those_that_are_read() -> None:
    rows = {cells[0]: cells[1] for cells in re.findall(r"^\| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)}
    system = next(cell for cell in rows if "__MACOSX" in cell)
    named = {name.lower() for name in re.findall(r"`([^`]+)`", system)}
    assert named - {"thumbs.db"} <= SYSTEM_FOLDERS
    beside = next(cell for cell in rows if "`masks/`" in cell)
    folders = {name.strip("/") for name in re.findall(r"`(\w+/)`", beside)}
    assert folders - {"images"} <= ANNOTATION_FOLDERS
    assert "images" in IMAGE_FOLDERS
    assert any("unlabeled/" in cell for cell in rows)
    assert "unlabeled" in UNLABELLED_FOLDERS


def test_kinds_of_refused_images_and_entries_of_the_manifest_exist() -> None:
    row = next(line for line in PAGE.splitlines() if "the notes count them by kind" in line)
    assert set(re.findall(r"`([^`]+)`", row)) == set(get_args(BadImageKind))
    schema = STORE_SHAPE.json_schema()
    for span in SPANS:
        if match := re.fullmatch(r"(source|images)\.(\w+)", span):
            section = schema["$defs"][
                schema["properties"][match[1]].get("$ref", "").rpartition("/")[2] or "_ImagesShape"
            ]
            assert match[2] in section["properties"], span


def test_names_of_archives_are_expanded() -> None:
    found = {span: len(list(expand_braces(span))) for span in SPANS if span.endswith(".tar") and "{" in span}
    assert found == {"a-{000..009}.tar": 10, "{train,val}-{0..3}.tar": 8}
