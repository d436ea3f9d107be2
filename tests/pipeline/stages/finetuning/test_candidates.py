"""All arms try the same learning rates, and each keeps its best on held-out images."""

from pathlib import Path
from typing import Any

from firstlight.pipeline.stages.finetuning.candidates import choose_candidates, list_candidates
from firstlight.pipeline.stages.sections.finetune import Finetune
from tests.support import recipes


def test_all_arms_share_one_grid_of_learning_rates_by_default(tmp_path: Path) -> None:
    adam = {"name": "Adam", "lr": 0.001}
    grids = {
        rates: recipes.recipe(
            tmp_path, stages__finetune__optimizer=adam, stages__finetune__learning_rates=rates and list(rates)
        ).stages["finetune"]
        for rates in (None, (), (0.1, 0.2))
    }
    assert all(isinstance(stage, Finetune) for stage in grids.values())
    found = {rates: list_candidates(stage) for rates, stage in grids.items() if isinstance(stage, Finetune)}
    for arm in ("pretrained", "scratch"):
        rates_of = {rates: tuple(rate for its, rate in found[rates].values() if its == arm) for rates in found}
        assert rates_of == {None: (0.000333, 0.001, 0.003), (): (0.001,), (0.1, 0.2): (0.1, 0.2)}


def test_each_arm_keeps_its_best_and_without_a_score_its_first(tmp_path: Path) -> None:
    stage: Any = recipes.recipe(tmp_path, stages__finetune__learning_rates=[0.1, 0.3, 0.2]).stages["finetune"]
    scores: dict[tuple[str, float], float | None] = {
        **{("pretrained", 0.1): 0.5, ("pretrained", 0.3): 0.7, ("pretrained", 0.2): 0.7},
        **{("scratch", 0.1): None, ("scratch", 0.3): None, ("scratch", 0.2): None},
    }
    held_out = {name: {"accuracy": scores[candidate]} for name, candidate in list_candidates(stage).items()}
    assert choose_candidates(stage, held_out) == {"pretrained": "pretrained-lr0.3", "scratch": "scratch-lr0.1"}
    held_out["scratch-lr0.2"] = {"accuracy": 0.0}
    assert choose_candidates(stage, held_out)["scratch"] == "scratch-lr0.2"
