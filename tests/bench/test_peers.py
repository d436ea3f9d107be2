"""The comparison with peers: the same images and steps, and ratios that say who is faster."""

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bench import peers
from bench.peers import PeerSetting, ProcessClock
from bench.timed_training import write_noise_photographs
from firstlight.pipeline.starter.choices import Wishes, choose_settings
from firstlight.pipeline.starter.survey import ImageSurvey


@pytest.fixture
def setting(tmp_path: Path) -> PeerSetting:
    torch.set_num_threads(1)
    return PeerSetting(write_noise_photographs(tmp_path / "images", 24, 32), 32, 8, 2, 1, tmp_path / "storage")


@pytest.mark.parametrize("as_init", [False, True])
@pytest.mark.parametrize("learn_labels", [False, True])
@pytest.mark.parametrize("resident", ["on", "off"])
def test_ours_is_timed(setting: PeerSetting, resident: str, learn_labels: bool, as_init: bool) -> None:
    clock = peers.train_ours(setting, resident, learn_labels, as_init)
    assert clock.wall_s > 0
    assert clock.cpu_s > 0


def test_settings_of_init_are_those_of_its_recipes(setting: PeerSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "multiplies_bf16_tiles", lambda: True)
    survey = ImageSurvey({"name": "folder", "root": "/data"}, 720, 240, ("a", "b"), 60, 224, False)
    written = choose_settings(survey, Wishes(), False).pretrain
    chosen = {name: written[name] for name in setting.as_init}
    assert chosen == {"channels_last": True, "precision": "auto"}
    assert setting.as_init == {**chosen, "precision": "bf16"}
    stage: Any = peers.make_peer_recipe(setting, [peers.PEER_CROP], "off", setting.as_init).stages["pretrain"]
    assert (stage.precision, stage.channels_last) == ("bf16", True)


@pytest.mark.parametrize("as_init", [False, True])
def test_torch_is_timed(setting: PeerSetting, as_init: bool) -> None:
    clock = peers.train_torch(setting, as_init=as_init)
    assert clock.wall_s > 0
    assert clock.cpu_s > 0


@pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")
def test_lightly_is_timed(setting: PeerSetting) -> None:
    assert peers.train_lightly(setting).wall_s > 0


@pytest.mark.skipif(find_spec("lightly_train") is None, reason="lightly-train is not installed")
def test_lightly_train_is_timed(setting: PeerSetting) -> None:
    assert peers.train_lightly_train(setting).wall_s > 0


def test_ratio_above_one_means_that_ours_is_faster(setting: PeerSetting) -> None:
    calls: list[str] = []
    seconds = {"peer": (6.0, 9.0), "off": (3.0, 6.0), "on": (2.0, 3.0), "alone": (1.5, 1.0)}

    def run_arm(train: Callable[..., ProcessClock], setting: PeerSetting, *options: Any) -> ProcessClock:
        is_ours = train is peers.train_ours
        assert is_ours or train is peers.train_torch
        assert not is_ours or options[1], "ours learns the labels, too"
        name = options[0] if is_ours else "alone" if options else "peer"
        as_init = options[2:] if is_ours else options[1:]
        calls.append(name + "*" * sum(as_init))
        wall_s, cpu_s = seconds[name]
        return ProcessClock(0, 1, wall_s, cpu_s / 2 if as_init else cpu_s)

    rows = peers.compare_peers(setting, 2, ["torch"], run_arm)
    assert rows == [
        ("torch", "streamed", 2.0, 1.5),
        ("torch", "held decoded", 3.0, 3.0),
        ("torch", "streamed, as init", 2.0, 3.0),
        ("torch", "held decoded, as init", 3.0, 6.0),
        ("torch", "network alone", 4.0, 9.0),
        ("torch", "network alone, as init", 4.0, 18.0),
    ]
    assert calls == ["peer", "off", "on", "off*", "on*", "alone", "alone*"] * 2


def test_an_arm_is_timed_in_a_process_of_its_own(setting: PeerSetting) -> None:
    clock = peers.run_in_own_process(peers.train_torch, setting, peers._repeat_batch)
    assert clock.wall_s > 0
    assert clock.cpu_s > 0


def test_small_images_have_half_the_jitter_and_no_blur() -> None:
    small, large = (peers.list_simclr_ops(side) for side in (32, 64))
    assert [op["op"] for op in large] == [*(op["op"] for op in small), "gaussian_blur"]
    assert large[2]["brightness"] == 2 * small[2]["brightness"]


def test_images_of_parquet_files_are_unpacked_by_class(tmp_path: Path) -> None:
    def encode(level: int) -> bytes:
        file = BytesIO()
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(file, "JPEG")
        return file.getvalue()

    images = [{"bytes": encode(k), "path": None} for k in range(6)]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1, 0, 1]}), tmp_path / "train-0.parquet")
    root = peers.unpack_parquet(tmp_path, tmp_path / "out", 5)
    assert sorted(file.relative_to(root).as_posix() for file in root.rglob("*.jpg")) == [
        *(f"class0/{k:06d}.jpg" for k in (0, 2, 4)),
        *(f"class1/{k:06d}.jpg" for k in (1, 3)),
    ]
    assert (root / "class1" / "000003.jpg").read_bytes() == images[3]["bytes"]


def test_cpu_seconds_are_those_of_children_too() -> None:
    before = peers.read_tree_seconds()
    sum(range(3_000_000))
    assert peers.read_tree_seconds() > before
