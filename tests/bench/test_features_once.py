"""The comparison of shared features: the arms differ in the passes over the images alone."""

from pathlib import Path
from typing import Any

import pytest

from bench import features_once
from bench.timed_training import write_noise_photographs
from firstlight.pipeline.stages.features import kept_features


@pytest.mark.usefixtures("blank_figures")
def test_arms_run_the_same_recipe_and_one_of_them_keeps_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    images = write_noise_photographs(tmp_path / "images", 40, 32)
    kept: dict[str, int] = {}
    write = kept_features.write_kept

    def write_counted(run: Path, key: str, rows: Any) -> None:
        write(run, key, rows)
        kept[run.parent.name] = max(kept.get(run.parent.name, 0), len(list((run / ".features").glob("*.safetensors"))))

    monkeypatch.setattr(kept_features, "write_kept", write_counted)
    for arm in features_once.FEATURE_ARMS:
        seconds = features_once.run_features_recipe(arm, images, tmp_path / arm, weights, "test_resnet", 32)
        assert seconds["wall_s"] > 0
        assert seconds["cpu_s"] > 0
    assert kept["shared"] > 0
    assert kept["apart"] == 0


def test_every_arm_is_a_process_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, Path]] = []

    def run(work: Any, arm: str, root: Path, storage: Path, *model: Any) -> dict[str, float]:
        assert work is features_once.run_features_recipe
        called.append((arm, storage))
        return {"wall_s": 2.0, "cpu_s": 1.0}

    monkeypatch.setattr(features_once, "run_in_own_process", run)
    found = features_once.measure_arms(tmp_path, tmp_path / "w", "test_resnet", 32, 2)
    assert found == {arm: [{"wall_s": 2.0, "cpu_s": 1.0}] * 2 for arm in features_once.FEATURE_ARMS}
    assert [arm for arm, _ in called] == ["shared", "apart"] * 2
    assert len({storage for _, storage in called}) == 4, "each has a storage of its own"
