"""Scores that another stage has computed are found by all that decides them, and left where they cannot be trusted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from firstlight.pipeline.stages.features.shared_scores import find_shared_scores, hash_arms, share_scores
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.feature_extractor import FeatureExtractor

SPEC = {"name": "convnet", "input": "gray", "norm": "batch", "width": 4, "depth": 2}
FACTS = {"stage": {"encoder": "a", "knn_k": 5, "arms": None}, "seed": 1, "store": "s", "from": "x"}


@pytest.fixture
def network() -> FeatureExtractor:
    torch.manual_seed(0)
    return FeatureExtractor(Encoder(SPEC, 8), None, (-1,), "avg")


@pytest.fixture
def scored(tmp_path: Path, network: FeatureExtractor) -> StageInstance:
    instance = StageInstance("evaluate", 1, "abc", tmp_path / "evaluate-seed1-abc", facts=FACTS)
    instance.folder.mkdir()
    instance.write_result({"random": {"knn": {"val": 0.5}}})
    share_scores(instance, hash_arms(instance, {"random": network}))
    return instance


def find(instance: StageInstance, network: FeatureExtractor, arm: str = "random") -> dict[str, object]:
    found = find_shared_scores(instance, hash_arms(instance, {arm: network}))
    return {name: scores.scores for name, scores in found.items()}


def test_other_encoders_leave_the_scores_of_random_weights(scored: StageInstance, network: FeatureExtractor) -> None:
    own = {**FACTS, "stage": {**FACTS["stage"], "encoder": "b"}, "from": "y"}  # type: ignore[dict-item]
    other = replace(scored, folder=scored.folder.with_name("other"), facts=own)
    assert find(other, network) == {"random": {"knn": {"val": 0.5}}}
    assert find(other, network, "given") == {}
    assert find(scored, network) == {}, "its own are not another's"


@pytest.mark.parametrize("change", [{"seed": 2}, {"store": "t"}, {"stage": {"encoder": "b", "knn_k": 9}}])
def test_other_facts_are_scored_anew(
    scored: StageInstance, network: FeatureExtractor, change: dict[str, object]
) -> None:
    assert find(replace(scored, folder=scored.folder.with_name("other"), facts={**FACTS, **change}), network) == {}


def test_other_weights_are_scored_anew(scored: StageInstance, network: FeatureExtractor) -> None:
    other = replace(scored, folder=scored.folder.with_name("other"))
    with torch.no_grad():
        next(network.parameters()).flatten()[0].add_(1e-6)
    assert find(other, network) == {}


def test_damaged_results_are_scored_anew(scored: StageInstance, network: FeatureExtractor) -> None:
    other = replace(scored, folder=scored.folder.with_name("other"))
    file = scored.folder / RESULT_FILE
    file.write_text(file.read_text().replace("0.5", "0.6"))
    assert find(other, network) == {}


def test_tensors_of_an_arm_are_read_from_the_other_stage(scored: StageInstance, network: FeatureExtractor) -> None:
    other = replace(scored, folder=scored.folder.with_name("other"))
    (found,) = find_shared_scores(other, hash_arms(other, {"random": network})).values()
    assert found.read_tensors("map.safetensors", "random") == {}
    save_file({"random_points": torch.ones(2), "pretrained_points": torch.zeros(2)}, scored.folder / "map.safetensors")
    assert list(found.read_tensors("map.safetensors", "random")) == ["random_points"]
    (scored.folder / "map.safetensors").write_bytes(b"no")
    assert found.read_tensors("map.safetensors", "random") == {}
