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
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench import peers
from bench.peers import PeerSetting
from bench.timed_training import write_noise_photographs
from bench.turns import TurnTotals
from firstlight.pipeline.run import auto_scale
from firstlight.pipeline.starter.choices import Wishes, choose_settings
from firstlight.pipeline.starter.survey import ImageSurvey


class EnoughSteps(Exception):
    """Ends an arm, which takes steps without an end."""


def check_steps(work: Callable[..., None], *arguments: Any) -> None:
    """Checks that an arm counts the updates of its weights: it is ended after the second."""
    counted: list[tuple[int, int]] = []
    updates: list[Any] = []

    def count_step(step: int) -> None:
        counted.append((step, len(updates)))
        if step == 2:
            raise EnoughSteps

    with register_optimizer_step_post_hook(lambda *of: updates.append(of)), pytest.raises(EnoughSteps):
        work(*arguments, count_step)
    assert counted[-2:] == [(1, 1), (2, 2)]


@pytest.fixture
def setting(tmp_path: Path) -> PeerSetting:
    torch.set_num_threads(1)
    return PeerSetting(write_noise_photographs(tmp_path / "images", 24, 32), 32, 8, tmp_path / "storage")


@pytest.mark.parametrize("as_init", [False, True])
@pytest.mark.parametrize("learn_labels", [False, True])
@pytest.mark.parametrize("resident", ["on", "off"])
def test_ours_counts_its_steps(setting: PeerSetting, resident: str, learn_labels: bool, as_init: bool) -> None:
    check_steps(peers.train_ours, setting, resident, learn_labels, as_init)


def test_settings_of_init_are_those_of_its_recipes(setting: PeerSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_scale, "multiplies_bf16_faster", lambda: True)
    survey = ImageSurvey({"name": "folder", "root": "/data"}, 720, 240, ("a", "b"), 60, 224, False)
    written = choose_settings(survey, Wishes(), False).pretrain
    assert {name: written[name] for name in peers.INIT_KEYS} == peers.INIT_KEYS
    stage: Any = peers.make_peer_recipe(setting, [peers.PEER_CROP], "off", peers.INIT_KEYS).stages["pretrain"]
    assert (stage.precision, stage.channels_last) == ("bf16", True)


@pytest.mark.parametrize("as_init", [False, True])
@pytest.mark.parametrize("load", [peers.load_batches, peers.repeat_batch])
def test_torch_counts_its_steps(setting: PeerSetting, load: peers.BatchSource, as_init: bool) -> None:
    check_steps(peers.train_torch, setting, load, as_init)


@pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")
def test_lightly_counts_its_steps(setting: PeerSetting) -> None:
    check_steps(peers.train_lightly, setting, peers.load_batches, False)


@pytest.mark.skipif(find_spec("lightly_train") is None, reason="lightly-train is not installed")
def test_lightly_train_counts_its_steps(setting: PeerSetting) -> None:
    check_steps(peers.train_lightly_train, setting)


def test_ratio_above_one_means_that_ours_is_faster() -> None:
    found = {"peer": TurnTotals(30, 6.0, 9.0), "streamed": TurnTotals(60, 6.0, 6.0), "alone": TurnTotals(30, 3.0, 1.0)}
    assert peers.compare_totals(found) == [("streamed", 2.0, 3.0), ("alone", 2.0, 9.0)]


@pytest.mark.parametrize(
    ("name", "work", "learn_labels"),
    [("torch", peers.train_torch, True), ("lightly", peers.train_lightly, False)],
    ids=["torch", "lightly"],
)
def test_ours_and_the_network_alone_do_what_the_peer_does(
    setting: PeerSetting, name: str, work: Callable[..., None], learn_labels: bool
) -> None:
    assert peers.list_arms(name, setting) == {
        "peer": (work, setting, peers.load_batches, False),
        "streamed": (peers.train_ours, setting, "off", learn_labels, False),
        "held decoded": (peers.train_ours, setting, "on", learn_labels, False),
        "network alone": (work, setting, peers.repeat_batch, False),
        "streamed, as init": (peers.train_ours, setting, "off", learn_labels, True),
        "held decoded, as init": (peers.train_ours, setting, "on", learn_labels, True),
        "network alone, as init": (work, setting, peers.repeat_batch, True),
    }


def test_lightly_train_has_no_loop_for_its_network_alone(setting: PeerSetting) -> None:
    arms = peers.list_arms("lightly-train", setting)
    assert arms["peer"] == (peers.train_lightly_train, setting)
    assert list(arms) == ["peer", "streamed", "held decoded", "streamed, as init", "held decoded, as init"]


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
