"""Parts of model cards: a file is written once, and tables and front matter escape what they hold."""

from pathlib import Path

from firstlight.pipeline.report.cards.card_parts import (
    CARD_FILE,
    join_sections,
    make_front_matter,
    name_library,
    name_network,
    name_seed,
    write_card_file,
)
from tests.support import recipes


def test_card_file_is_written_only_if_its_text_changes(tmp_path: Path) -> None:
    assert write_card_file(tmp_path, "# A\x1b\n") == "# A\\x1b\n"
    assert (tmp_path / CARD_FILE).read_text("utf-8") == "# A\\x1b\n"
    assert write_card_file(tmp_path, "# A\x1b\n") is None
    assert write_card_file(tmp_path, "# B\n") == "# B\n"


def test_front_matter_quotes_its_values(tmp_path: Path) -> None:
    text = make_front_matter(recipes.recipe(tmp_path), "image-classification", ['a"b'], {})
    assert text.splitlines()[0] == text.splitlines()[-1] == "---"
    assert r'tags: ["a\"b"]' in text
    assert 'datasets: ["digits"]' in text
    assert 'license: "unknown"' in text
    assert 'library_name: "firstlight"' in text


def test_library_is_timm_where_it_loads_the_folder_by_its_name() -> None:
    assert name_library(None) == "firstlight"
    assert name_library({"formats": {"timm": {"files": {"model.safetensors": {}}}}}) == "firstlight"
    assert name_library({"formats": {"timm": {"files": {"config.json": {}}}}}) == "timm"


def test_seed_is_a_number_or_unknown() -> None:
    assert name_seed({"seed": 3}) == "3"
    assert name_seed({"seed": "<b>"}) == name_seed({}) == "unknown"


def test_empty_sections_are_left_out() -> None:
    assert join_sections(["a", "", "b"]) == "a\n\nb\n"


def test_network_of_a_library_is_named_with_it() -> None:
    assert name_network({"name": "timm", "model": "resnet10t"}) == "resnet10t of timm"
    assert name_network({"name": "convnet"}) == "convnet"
