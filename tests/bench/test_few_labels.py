"""The comparison of few-label fine-tunings: each arm makes the same trainings, and its seconds are counted."""

from pathlib import Path
from typing import Any

import pytest

from bench import few_labels
from bench.few_labels import FEW_LABEL_ARMS, INIT_SPEED, ONE_PROCESS, OUR_SPEEDS, BareLoop, FewLabelSetting
from firstlight.pipeline.run import auto_scale
from firstlight.pipeline.train.checkpoint import Checkpoints
from tests.support.photograph_folders import make_photograph
from tests.support.state_hash import hash_state


@pytest.fixture
def setting(tmp_path: Path) -> FewLabelSetting:
    """75 photographs in three classes."""
    for number in range(75):
        file = tmp_path / "images" / "abc"[number % 3] / f"{number:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        make_photograph(40, 48, seed=number).save(file)
    return FewLabelSetting(tmp_path / "images", labels=11, epochs=2, side=16)


def test_arms_fine_tune_as_often_on_as_many_images(setting: FewLabelSetting, tmp_path: Path) -> None:
    result = few_labels.run_our_stage(setting, tmp_path / "ours", *OUR_SPEEDS[ONE_PROCESS])
    starts = ("pretrained", "scratch")
    assert sorted(result["tried"]) == [f"{start}-lr{rate}" for start in starts for rate in few_labels.TRIED_RATES]
    assert result["labels"] == 33
    weights = [read_weights(tmp_path / "ours/job" / f"{start}-lr0.03" / "checkpoints") for start in starts]
    assert weights[0] != weights[1], "no training is left out because another one is the same"
    bare = BareLoop(setting)
    assert len(bare.labelled) == 33
    assert sorted(bare.train.targets[index] for index in bare.labelled) == [0] * 11 + [1] * 11 + [2] * 11
    assert not {*bare.labelled} & {*bare.held_out, *bare.test}
    found = bare.run()
    assert tuple(found) == starts
    assert all(0.0 <= value <= 1.0 for value in found.values())


@pytest.mark.parametrize("gains", [False, True])
def test_the_number_format_is_chosen_as_for_a_recipe_of_init(
    setting: FewLabelSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: bool
) -> None:
    monkeypatch.setattr(auto_scale, "multiplies_bf16_faster", lambda: gains)
    stages: list[Any] = [
        few_labels.make_few_labels_recipe(setting, tmp_path, *OUR_SPEEDS[arm]).stages["finetune"]
        for arm in (ONE_PROCESS, INIT_SPEED)
    ]
    assert [stage.precision for stage in stages] == ["fp32", "bf16" if gains else "fp32"]


def read_weights(folder: Path) -> str:
    found, _ = Checkpoints(folder).read_newest()
    assert found is not None
    return hash_state(found.shared["model"])


def test_seconds_are_means_of_turns(setting: FewLabelSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def run(work: object, arm: str, asked: FewLabelSetting) -> dict[str, float]:
        assert (work, asked) == (few_labels.run_few_labels_arm, setting)
        called.append(arm)
        return {"wall_s": float(len(called)), "cpu_s": 1.0}

    monkeypatch.setattr(few_labels, "run_in_own_process", run)
    found = few_labels.compare_few_labels_arms(setting, 2)
    assert called == [*FEW_LABEL_ARMS] * 2
    between = len(FEW_LABEL_ARMS) / 2
    assert found == {arm: {"wall_s": 1.0 + between + k, "cpu_s": 1.0} for k, arm in enumerate(FEW_LABEL_ARMS)}
