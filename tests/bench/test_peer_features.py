"""SimCLR here beside lightly's: the same images, passes and scores, and a file that keeps what is done."""

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
NO_ENCODER: Any = None


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


def test_a_row_has_the_scores_of_its_arm(study: tuple[StageContext, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    context, stage = study
    monkeypatch.setattr(peer_features, "train_ours_for", lambda *asked: TrainedPeer(NO_ENCODER, asked[3], 2.5))
    monkeypatch.setattr(peer_features, "train_lightly_on", lambda *asked: TrainedPeer(NO_ENCODER, 1, 7.0))
    monkeypatch.setattr(peer_features, "score_encoder", lambda context, encoder: {"knn": 0.5, "probe": 0.6})
    scores = {"knn": 0.5, "probe": 0.6}
    made = [peer_features.make_row(context, stage, arm, 3, 9) for arm in (OURS, LIGHTLY)]
    assert made == [
        {"arm": OURS, "seed": 3, "epochs": 9, "cpu_s": 2.5, **scores},
        {"arm": LIGHTLY, "seed": 3, "epochs": 1, "cpu_s": 7.0, **scores},
    ]


def test_rows_are_made_once_and_the_last_arm_takes_the_time_of_the_other(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    def make(arm: str, seed: int, epochs: int) -> dict[str, Any]:
        calls.append((arm, seed, epochs))
        seconds = 14.0 if arm == LIGHTLY else 2.0 * epochs
        return {"arm": arm, "seed": seed, "epochs": epochs, "cpu_s": seconds, "knn": 0.5 + 0.1 * seed, "probe": 0.6}

    file = tmp_path / "rows.jsonl"
    rows = peer_features.compare_simclr(2, (0, 1), file, make)
    assert calls[:3] == [(OURS, 0, 2), (LIGHTLY, 0, 2), (OURS_LONGER, 0, 7)]
    assert [row["arm"] for row in rows] == [OURS, OURS, LIGHTLY, LIGHTLY, OURS_LONGER, OURS_LONGER]
    assert peer_features.compare_simclr(2, (0, 1), file, make) == rows
    assert len(calls) == 6
    assert len(file.read_text().splitlines()) == 6
    table = peer_features.format_rows(rows)
    assert list(table.columns[3].cells) == ["55.0 ± 7.1"] * 3
    assert list(table.columns[1].cells) == ["2.0", "2.0", "7.0"]
