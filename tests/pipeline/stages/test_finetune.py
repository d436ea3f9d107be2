"""The fine-tuning stage chooses each arm's learning rate on held-out images, and scores the choice on test images."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetune import FinetuneStage
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.train.metrics import read_metrics
from tests.support.finetunings import start_arm


@pytest.mark.parametrize("score_test", [True, False])
def test_chosen_rate_is_the_best_on_held_out_images(tmp_path: Path, digits: Store, score_test: bool) -> None:
    context, stage, instance, _ = start_arm(tmp_path, digits, "pretrained", score_test=score_test)
    kind = FinetuneStage()
    kind.run(context, stage, instance)
    result: Any = instance.result
    kind.result_shape(stage).validate_python(result)
    assert set(result["tried"]) == {f"{arm}-lr{rate}" for arm in ("pretrained", "scratch") for rate in (0.1, 0.3)}
    (measure,) = stage.measures
    for arm in ("pretrained", "scratch"):
        tried = {name: score for name, score in result["tried"].items() if name.startswith(arm)}
        assert result[arm]["val"] == max(tried.values()) == tried[f"{arm}-lr{result[arm]['lr']:g}"]
        assert kind.read_objective(stage, arm, instance) == result[arm]["val"]
        assert kind.read_score(stage, measure, arm, "test", instance) == result[arm].get("test")
        assert ("test" in result[arm]) == score_test
    assert read_model(kind.outputs(stage, instance)[0].path).facts["lr"] == result["pretrained"]["lr"]
    for file in kind.metrics_files(stage, instance):
        assert read_metrics(file.path)
