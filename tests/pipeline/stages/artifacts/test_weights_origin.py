"""The known facts of existing weights are found again, whatever was trained since."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.artifacts.weights_origin import trace_weights
from tests.support import recipes
from tests.support.saved_encoders import make_small_encoder


@pytest.mark.parametrize(
    ("saved", "changes", "origin"),
    [
        ({}, {}, {}),
        ({"weights": {"source": "a", "licence": "mit"}}, {}, {"source": "a", "licence": "mit"}),
        ({"weights": {"licence": ["mit"], "sha256": 3}}, {}, {}),
        ({"weights": "mit"}, {}, {}),
        ({}, {"encoder__weights": "/x/w.pth"}, {"source": "w.pth"}),
        ({"weights": {"source": "old.pth"}}, {"encoder__weights": "/x/w.pth"}, {"source": "old.pth"}),
        (
            {"weights": {"licence": "mit"}},
            {"encoder__weights": "/x/w.pth", "encoder__licence": "gpl"},
            {"source": "w.pth", "licence": "gpl"},
        ),
        ({}, {"encoder__weights": "runs:/1/encoder"}, {}),
        ({}, {"encoder__weights": "/x/w.pth", "stages__pretrain__encoder": "random"}, {}),
        (
            {"weights": {"source": "a"}},
            {"encoder__weights": "/x/w.pth", "encoder__licence": "gpl", "stages__pretrain__encoder": "runs:/1/encoder"},
            {"source": "a"},
        ),
    ],
)
def test_origin_of_weights_is_what_was_saved_and_what_the_recipe_states(
    tmp_path: Path, saved: dict[str, Any], changes: dict[str, Any], origin: dict[str, str]
) -> None:
    save_encoder(make_small_encoder(), tmp_path / "encoder", saved)
    recipe = recipes.recipe(tmp_path, stages__export={"kind": "export"}, **changes)
    for stage in ("pretrain", "export"):
        assert trace_weights(recipe, stage, tmp_path / "encoder") == origin


@pytest.mark.parametrize(("arm", "licence"), [("pretrained", "gpl"), ("given", "gpl"), ("scratch", None)])
def test_arm_of_a_fine_tuning_decides_which_weights_it_comes_from(
    tmp_path: Path, arm: str, licence: str | None
) -> None:
    recipe = recipes.recipe(tmp_path, encoder__weights="/x/w.pth", encoder__licence="gpl")
    save_encoder(make_small_encoder(), tmp_path / "model", {"arm": arm})
    assert trace_weights(recipe, "finetune", tmp_path / "model").get("licence") == licence
    save_encoder(make_small_encoder(), tmp_path / "start", {})
    assert trace_weights(recipe, "finetune", tmp_path / "start", arm).get("licence") == licence
