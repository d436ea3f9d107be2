"""SimCLR here beside lightly's: the same images, passes and scores, and a file that keeps what is done."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import peer_features
from bench.peer_features import LIGHTLY, OURS, OURS_LONGER, TrainedPeer
from firstlight.pipeline.train.context import StageContext

SMALL = (
    "dataset.max_train=400",
    "dataset.max_test=60",
    "defaults.pretrain.epochs=1",
    "defaults.pretrain.batch_size=64",
)


@pytest.fixture(scope="module")
def study(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StageContext, Any]:
    torch.set_num_threads(1)
    return peer_features.load_study(cifar10, tmp_path_factory.mktemp("study"), *SMALL)


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


@pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")
def test_both_train_the_study_s_network_and_are_scored_alike(study: tuple[StageContext, Any], tmp_path: Path) -> None:
    context, stage = study
    root = peer_features.write_class_folders(context, tmp_path)
    ours = peer_features.train_ours_for(context, stage, 0, 2, tmp_path / "job")
    theirs = peer_features.train_lightly_on(context, stage, 0, root)
    assert (ours.epochs, theirs.epochs) == (2, 1)
    assert ours.encoder.spec == theirs.encoder.spec == context.recipe.network_spec
    for trained in (ours, theirs):
        assert trained.cpu_s > 0
        torch.manual_seed(0)
        fresh = type(trained.encoder)(trained.encoder.spec, trained.encoder.image_size)
        weights = zip(trained.encoder.parameters(), fresh.parameters(), strict=True)
        assert all(not torch.equal(one, other) for one, other in weights), "every weight was trained"
        scores = peer_features.score_encoder(context, trained.encoder)
        assert set(scores) == {"knn", "probe"}
        assert all(0 <= score <= 1 for score in scores.values())


def test_rows_are_made_once_and_the_last_arm_takes_the_time_of_the_other(
    study: tuple[StageContext, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, stage = study
    calls: list[tuple[str, int]] = []

    def train_ours(context: StageContext, stage: Any, seed: int, epochs: int, folder: Path) -> TrainedPeer:
        calls.append((OURS, epochs))
        return TrainedPeer(None, epochs, 2.0 * epochs)  # type: ignore[arg-type]

    def train_lightly(context: StageContext, stage: Any, seed: int, root: Path) -> TrainedPeer:
        calls.append((LIGHTLY, stage.epochs))
        return TrainedPeer(None, stage.epochs, 7.0)  # type: ignore[arg-type]

    monkeypatch.setattr(peer_features, "train_ours_for", train_ours)
    monkeypatch.setattr(peer_features, "train_lightly_on", train_lightly)
    monkeypatch.setattr(peer_features, "score_encoder", lambda context, encoder: {"knn": 0.5, "probe": 0.6})
    monkeypatch.setattr(peer_features, "write_class_folders", lambda context, root: root)
    file = tmp_path / "rows.jsonl"
    rows = peer_features.compare_features(context, stage, (0,), file, lambda line: None)
    assert calls == [(OURS, 1), (LIGHTLY, 1), (OURS, 3)]
    assert [(row["arm"], row["epochs"]) for row in rows] == [(OURS, 1), (LIGHTLY, 1), (OURS_LONGER, 3)]
    assert peer_features.compare_features(context, stage, (0,), file, lambda line: None) == rows
    assert len(calls) == 3
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
