"""Pictures that a method draws on the workers, in one safetensors file with their titles in its header."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.records import refuse_damage
from firstlight.tasks.visuals import ImageGrid, ImageRow, describe_shown, show_channels

PICTURES_FILE, NUM_VIEWED_IMAGES = "pictures.safetensors", 8
# The first filters of the networks that a stage has trained.
FILTERS_FILE = "filters.safetensors"
# The name of those of a pretraining, which trains one network.
PRETRAINED_FILTERS = "encoder"


def pair_with_untrained(before: Sequence[ImageGrid], after: Sequence[ImageGrid]) -> tuple[ImageGrid, ...]:
    """Returns the pictures of a trained method; above each row that asks for it stands the same row before the
    training.
    """
    untrained = {(picture.name, row.caption): row for picture in before for row in picture.rows}
    out = []
    for picture in after:
        rows: list[ImageRow] = []
        for row in picture.rows:
            earlier = untrained.get((picture.name, row.caption)) if row.untrained else None
            pair = (
                [replace(earlier, caption=f"{row.caption}, before"), replace(row, caption=f"{row.caption}, after")]
                if earlier
                else [row]
            )
            rows += pair
        out.append(replace(picture, rows=tuple(rows)))
    return tuple(out)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file.

    Raises:
        UserError: it is missing or damaged; names the file.
    """
    with refuse_damage(file):
        found: dict[str, Tensor] = load(file.read_bytes())
    return found


def save_pictures(pictures: Iterable[ImageGrid], file: Path) -> None:
    """Writes pictures to a file, in the colours of `show_channels`; no file is written if there are none."""
    tensors: dict[str, Tensor] = {}
    titles = []
    for picture in pictures:
        for k, row in enumerate(picture.rows):
            tensors[f"{picture.name}.{k}.images"] = _copy_tensor(show_channels(row.images))
            if row.maps is not None:
                tensors[f"{picture.name}.{k}.maps"] = _copy_tensor(row.maps)
        title = picture.title + describe_shown(picture.rows[0].images.shape[1])
        titles.append({"name": picture.name, "title": title, "rows": [row.caption for row in picture.rows]})
    if titles:
        write_atomically(file, save(tensors, {"pictures": json.dumps(titles)}))


def _copy_tensor(tensor: Tensor) -> Tensor:
    """Returns a copy: safetensors refuses tensors that share memory, as rows of the same images do."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_pictures(file: Path) -> list[ImageGrid]:
    """Returns the saved pictures; none if there is no file.

    Raises:
        UserError: the file is damaged; names it.
    """
    if not file.exists():
        return []
    with refuse_damage(file), safe_open(str(file), "pt") as opened:  # type: ignore[no-untyped-call]
        keys = set(opened.keys())
        out = []
        for entry in json.loads(opened.metadata()["pictures"]):
            places = [(caption, f"{entry['name']}.{k}") for k, caption in enumerate(entry["rows"])]
            rows = [
                ImageRow(
                    caption,
                    opened.get_tensor(f"{at}.images"),
                    opened.get_tensor(f"{at}.maps") if f"{at}.maps" in keys else None,
                )
                for caption, at in places
            ]
            out.append(ImageGrid(entry["name"], entry["title"], tuple(rows)))
    return out


def save_filters(networks: Mapping[str, Sequence[Tensor]], file: Path) -> None:
    """Writes the (n, c, k, k) first filters of networks by name, a tensor for each tower; no file if there are none."""
    tensors = {
        f"{number}.{name}.{tower}": _copy_tensor(filters)
        for number, (name, towers) in enumerate(networks.items())
        for tower, filters in enumerate(towers)
    }
    if tensors:
        write_atomically(file, save(tensors))


def load_filters(file: Path) -> dict[str, list[Tensor]]:
    """Returns the saved filters by network, in the order of `save_filters`; {} if there is no file.

    Raises:
        UserError: as `load_pictures`.
    """
    if not file.exists():
        return {}
    found: dict[str, list[Tensor]] = {}
    with refuse_damage(file), safe_open(str(file), "pt") as opened:  # type: ignore[no-untyped-call]
        # The tensors of a file have no order.
        parts = [key.split(".") for key in list(opened.keys())]
        for number, name, tower in sorted((int(number), name, int(tower)) for number, name, tower in parts):
            found.setdefault(name, []).append(opened.get_tensor(f"{number}.{name}.{tower}"))
    return found
