"""SimCLR here beside that of others: the same images, passes and scores, and a file that keeps what is done."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import peer_features
from bench.peer_features import CPU_SECONDS, LIGHTLY, LIGHTLY_TRAIN, OURS, SECONDS, TrainedPeer, name_longer
from firstlight.pipeline.run import auto_scale
from firstlight.pipeline.run.launching import threads as launching_threads
from firstlight.pipeline.train.context import StageContext
from tests.support import layouts

SMALL = (
    "dataset.max_train=180",
    "dataset.max_test=30",
    "defaults.pretrain.epochs=1",
    "defaults.pretrain.batch_size=64",
)
NO_ENCODER: Any = None


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageContext, Any]:
    """The study on images of noise in the layout of CIFAR-10."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("cifar10")
    layouts.cifar10(root, 220, 40)
    return peer_features.load_study(root, tmp_path_factory.mktemp("study"), CPU_SECONDS, *SMALL)


@pytest.mark.parametrize(
    ("budget", "threads", "precision"), [(CPU_SECONDS, 1, "fp32"), (SECONDS, 3, "bf16")], ids=["CPU", "clock"]
)
def test_arms_have_all_cores_where_a_clock_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, threads: int, precision: str
) -> None:
    monkeypatch.setattr(auto_scale, "multiplies_bf16_faster", lambda: True)
    monkeypatch.setattr(launching_threads, "count_cores", lambda cpus=None: 3)
    (tmp_path / "cifar10").mkdir()
    layouts.cifar10(tmp_path / "cifar10", 60, 20)
    context, stage = peer_features.load_study(tmp_path / "cifar10", tmp_path / "study", budget)
    assert torch.get_num_threads() == threads
    assert (context.recipe.scale.threads, stage.precision) == (threads, precision)


def test_training_images_are_written_by_class(study: tuple[StageContext, Any], tmp_path: Path) -> None:
    context, _ = study
    root = peer_features.write_class_folders(context, tmp_path)
    files = {int(file.stem): file.parent.name for file in root.rglob("*.jpg")}
    labels = context.splits.labels[context.splits.train]
    assert files == {
        k: f"class{label}" for k, label in zip(context.splits.train.tolist(), labels.tolist(), strict=True)
    }
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*.jpg")}
    peer_features.write_class_folders(context, tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob("*.jpg")}


def check_trained(context: StageContext, trained: TrainedPeer, epochs: int) -> None:
    assert trained.epochs == epochs
    assert trained.encoder.spec == context.recipe.network_spec
    assert trained.wall_s > 0
    assert trained.cpu_s > 0
    torch.manual_seed(0)
    fresh = type(trained.encoder)(trained.encoder.spec, trained.encoder.image_size)
    weights = zip(trained.encoder.parameters(), fresh.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in weights), "every weight was trained"
    scores = peer_features.score_encoder(context, trained.encoder)
    assert set(scores) == {"knn", "probe"}
    assert all(0 <= score <= 1 for score in scores.values())


def test_ours_trains_the_study_s_network_as_long_as_asked(study: tuple[StageContext, Any], tmp_path: Path) -> None:
    context, stage = study
    longer = stage.model_copy(update={"epochs": 2})
    check_trained(context, peer_features.train_ours_for(context, longer, 0, tmp_path / "job"), 2)


@pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")
def test_lightly_trains_the_study_s_network(study: tuple[StageContext, Any], tmp_path: Path) -> None:
    context, stage = study
    root = peer_features.write_class_folders(context, tmp_path)
    check_trained(context, peer_features.train_lightly_on(context, stage, 0, root), 1)


@pytest.mark.skipif(find_spec("lightly_train") is None, reason="lightly-train is not installed")
def test_lightly_train_trains_the_study_s_network(study: tuple[StageContext, Any], tmp_path: Path) -> None:
    context, stage = study
    root = peer_features.write_class_folders(context, tmp_path)
    check_trained(context, peer_features.train_lightly_train_on(context, stage, 0, root), 1)


def test_lightly_train_gets_the_map_of_the_encoder_and_its_mean(study: tuple[StageContext, Any]) -> None:
    context, _ = study
    encoder = peer_features.Encoder(context.recipe.network_spec, context.recipe.dataset.image_size).eval()
    wrapped, images = peer_features.WrappedEncoder(encoder).eval(), torch.rand(2, 3, 32, 32)
    found = wrapped.forward_features(images)
    pooled = wrapped.forward_pool(found)["pooled_features"]
    assert torch.equal(found["features"], encoder(images)[-1])
    assert pooled.shape == (2, wrapped.feature_dim(), 1, 1)
    assert torch.allclose(pooled.flatten(1), peer_features.pool_maps(encoder(images), "avg"))
    assert wrapped.get_model() is encoder


def test_a_row_has_the_scores_of_its_arm(study: tuple[StageContext, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    context, stage = study
    monkeypatch.setattr(peer_features, "train_ours_for", lambda *asked: TrainedPeer(NO_ENCODER, 9, 2.0, 2.5))
    monkeypatch.setattr(peer_features, "train_lightly_on", lambda *asked: TrainedPeer(NO_ENCODER, 1, 5.0, 7.0))
    monkeypatch.setattr(peer_features, "train_lightly_train_on", lambda *asked: TrainedPeer(NO_ENCODER, 1, 6.0, 8.0))
    monkeypatch.setattr(peer_features, "score_encoder", lambda context, encoder: {"knn": 0.5, "probe": 0.6})
    scores = {"knn": 0.5, "probe": 0.6}
    made = [peer_features.make_row(context, stage, arm, 3) for arm in (OURS, LIGHTLY, LIGHTLY_TRAIN)]
    assert made == [
        {"arm": OURS, "seed": 3, "epochs": 9, "wall_s": 2.0, "cpu_s": 2.5, **scores},
        {"arm": LIGHTLY, "seed": 3, "epochs": 1, "wall_s": 5.0, "cpu_s": 7.0, **scores},
        {"arm": LIGHTLY_TRAIN, "seed": 3, "epochs": 1, "wall_s": 6.0, "cpu_s": 8.0, **scores},
    ]


@pytest.mark.parametrize(
    ("budget", "counted", "other"), [(SECONDS, "wall_s", "cpu_s"), (CPU_SECONDS, "cpu_s", "wall_s")]
)
def test_rows_are_made_once_and_ours_takes_the_time_of_each_other(
    tmp_path: Path, budget: str, counted: str, other: str
) -> None:
    calls: list[tuple[str, int, int]] = []
    peers, taken = (LIGHTLY, LIGHTLY_TRAIN), {LIGHTLY: 14.0, LIGHTLY_TRAIN: 6.0}

    def make(arm: str, seed: int, epochs: int) -> dict[str, Any]:
        calls.append((arm, seed, epochs))
        times = {counted: taken.get(arm, 2.0 * epochs), other: 1.0}
        return {"arm": arm, "seed": seed, "epochs": epochs, **times, "knn": 0.5 + 0.1 * seed, "probe": 0.6}

    file = tmp_path / "rows.jsonl"
    rows = peer_features.compare_simclr(2, (0, 1), file, make, peers, budget)
    longer = [name_longer(peer) for peer in peers]
    arms = [OURS, LIGHTLY, longer[0], LIGHTLY_TRAIN, longer[1]]
    assert calls[:5] == [(arm, 0, epochs) for arm, epochs in zip(arms, (2, 2, 7, 2, 3), strict=True)]
    assert [row["arm"] for row in rows] == [arm for arm in arms for _ in range(2)]
    assert peer_features.compare_simclr(2, (0, 1), file, make, peers, budget) == rows
    assert peer_features.compare_simclr(2, (0, 1), file, make, (LIGHTLY,), budget) == rows[:6]
    assert len(calls) == 10
    assert len(file.read_text().splitlines()) == 10
    table = peer_features.format_rows(rows)
    assert list(table.columns[4].cells) == ["55.0 ± 7.1"] * 5
    assert list(table.columns[1].cells) == ["2.0", "2.0", "7.0", "2.0", "3.0"]
    shown = {"seconds": counted == "wall_s", "CPU seconds": counted == "cpu_s"}
    for column in table.columns[2:4]:
        assert list(column.cells)[1] == ("14.0" if shown[str(column.header)] else "1.0")
