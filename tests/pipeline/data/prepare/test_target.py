"""The folder of a store is a function of what decides its content."""

import os
from pathlib import Path

from tests.support.grey_images import dataset, images, local


def test_folder_is_a_function_of_decisive_options(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 10)
    first = local(dataset(root=root), tmp_path / "out").path
    assert first.name.startswith("tiny-")
    for same in ({"image_size": 64}, {"val_fraction": 0.3}, {"max_train": 5}, {"max_bad_fraction": 0.5}):
        assert local(dataset(root=root, **same), tmp_path / "out").path == first
    others = [
        local(dataset(root=root, **other), tmp_path / "out").path
        for other in ({"split_seed": 1}, {"max_pixels": 100}, {"test_fraction": 0.5})
    ]
    os.utime(root / "train" / "a" / "000.png", (1, 1))
    others.append(local(dataset(root=root), tmp_path / "out").path)
    assert len({first, *others}) == 5
