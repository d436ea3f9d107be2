"""Scores of frozen features that another stage of the recipe has computed from the same weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from firstlight.pipeline.config.load import hash_json
from firstlight.pipeline.records import DamagedRecord, read_json_record
from firstlight.pipeline.stages.shared_work import find_shared_folder, hash_weights, list_shared_facts, share_folder
from firstlight.pipeline.stages.stage import ANY_RESULT, RESULT_FILE, StageInstance
from firstlight.tasks.collective import broadcast_object, rank
from firstlight.tasks.nn.feature_extractor import FeatureExtractor

# Keys of a section that say which networks are scored, not how.
COMPARED_KEYS = frozenset({"encoder", "arms", "knn_bank"})


@dataclass(frozen=True)
class SharedScores:
    """The scores of one arm in the result of another stage, and its tensors `<arm>_...` in a file there."""

    scores: Mapping[str, Any]
    folder: Path

    def read_tensors(self, file: str, arm: str) -> dict[str, Tensor]:
        """Returns the tensors of the arm in a file of the other stage; {} if the file is missing or damaged."""
        try:
            found = load_tensors((self.folder / file).read_bytes())
        except (OSError, SafetensorError):
            return {}
        return {name: value for name, value in found.items() if name.startswith(f"{arm}_")}


def hash_arms(instance: StageInstance, networks: Mapping[str, FeatureExtractor]) -> dict[str, str]:
    """Returns a hash of all that decides the scores of each arm."""
    facts = list_shared_facts(instance, COMPARED_KEYS)
    return {
        arm: hash_json({"scores of": arm, "weights": hash_weights(network), **facts})
        for arm, network in networks.items()
    }


def find_shared_scores(instance: StageInstance, keys: Mapping[str, str]) -> dict[str, SharedScores]:
    """Returns the arms that another stage has scored, by their hashes `keys`. It is collective."""
    folders = {arm: find_shared_folder(instance, key) for arm, key in keys.items()}
    found = {}
    for arm, folder in folders.items():
        if folder not in (None, instance.folder):
            scores = broadcast_object(_read_scores(folder, arm) if rank() == 0 else None)
            if scores is not None:
                found[arm] = SharedScores(scores, folder)
    return found


def _read_scores(folder: Path, arm: str) -> dict[str, Any] | None:
    try:
        return (read_json_record(folder / RESULT_FILE, ANY_RESULT) or {}).get(arm)
    except DamagedRecord:
        return None


def share_scores(instance: StageInstance, keys: Mapping[str, str]) -> None:
    """Says that the scores of the arms, by their hashes `keys`, are in the result of an instance."""
    for key in keys.values():
        share_folder(instance, key, instance.folder)
