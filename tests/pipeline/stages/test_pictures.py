"""Pictures of methods on their way from the workers to the driver."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report import image_figures
from firstlight.pipeline.stages.pictures import (
    load_filters,
    load_pictures,
    pair_with_untrained,
    read_tensors,
    save_filters,
    save_pictures,
)
from firstlight.tasks.visuals import ImageGrid, ImageRow


def pictures(fill: float) -> tuple[ImageGrid, ...]:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = torch.full((3, 4, 4), fill)
    return ImageGrid(
        "cam", "maps", (ImageRow("image", images), ImageRow("evidence", images, maps, untrained=True))
    ), ImageGrid("b", "zz", (ImageRow("z", images[:2]),))


def test_saved_pictures_are_loaded_in_their_order(tmp_path: Path) -> None:
    save_pictures(pictures(0.25), tmp_path / "p")
    first, second = load_pictures(tmp_path / "p")
    assert (first.name, first.title, [row.caption for row in first.rows]) == ("cam", "maps", ["image", "evidence"])
    assert torch.equal(first.rows[1].images, pictures(0.25)[0].rows[1].images)
    assert first.rows[0].maps is None
    assert first.rows[1].maps is not None
    assert first.rows[1].maps.eq(0.25).all()
    assert second.rows[0].images.shape == (2, 3, 8, 8)


def test_no_pictures_write_no_file(tmp_path: Path) -> None:
    save_pictures((), tmp_path / "p")
    assert not (tmp_path / "p").exists()
    assert load_pictures(tmp_path / "p") == []


def test_rows_that_ask_for_it_stand_below_those_of_the_untrained_network(tmp_path: Path) -> None:
    both = pair_with_untrained(pictures(0.0), pictures(1.0))
    assert [row.caption for row in both[0].rows] == ["image", "evidence, before", "evidence, after"]
    assert [float(row.maps.mean()) for row in both[0].rows if row.maps is not None] == [0.0, 1.0]
    assert [row.caption for row in both[1].rows] == ["z"]
    assert [row.caption for row in pair_with_untrained((), pictures(1.0))[0].rows] == ["image", "evidence"]
    save_pictures(both, tmp_path / "p")
    assert len(load_pictures(tmp_path / "p")[0].rows) == 3


def test_maps_are_drawn_over_their_images() -> None:
    figure = image_figures.draw_image_grid(pair_with_untrained(pictures(0.0), pictures(1.0))[0])
    drawn = figure.axes[0].get_images()
    assert len(drawn) == 3 + 2 * 3 + 2 * 3, "the maps lie over their images"
    assert [float(image.get_array().mean()) for image in drawn[4:9:2]] == [0.0] * 3
    assert [float(image.get_array().mean()) for image in drawn[10::2]] == [1.0] * 3
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "maps",
        "image",
        "evidence, before",
        "evidence, after",
    ]


def test_filters_of_networks_are_loaded_in_their_order(tmp_path: Path) -> None:
    networks = {f"arm{k}": [torch.full((2, 3, 3, 3), float(k))] for k in (10, 9, 2)}
    networks["towers"] = [torch.zeros(4, 3, 3, 3), torch.ones(4, 1, 5, 5)]
    save_filters(networks, tmp_path / "f")
    found = load_filters(tmp_path / "f")
    assert list(found) == ["arm10", "arm9", "arm2", "towers"]
    assert [float(found[name][0].mean()) for name in found] == [10.0, 9.0, 2.0, 0.0]
    assert [tower.shape for tower in found["towers"]] == [(4, 3, 3, 3), (4, 1, 5, 5)]


def test_networks_without_filters_write_no_file(tmp_path: Path) -> None:
    save_filters({"encoder": []}, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    assert load_filters(tmp_path / "f") == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 100, save({"a": torch.ones(2)}), save({}, {"pictures": "[{}]"}), save({}, {"pictures": "{"})],
)
def test_damaged_pictures_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pictures.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/pictures\.safetensors: is damaged: "):
        load_pictures(tmp_path / "pictures.safetensors")
    with pytest.raises(UserError, match=rf"^{tmp_path}/none: is damaged: FileNotFoundError"):
        read_tensors(tmp_path / "none")
