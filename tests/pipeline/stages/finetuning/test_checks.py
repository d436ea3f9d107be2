"""A fine-tuning whose settings do not fit its network is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import preflight
from tests.support import recipes
from tests.support.finetunings import HEAD, RESCALED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"name": "convnet", "norm": "group", "width": 4, "depth": 2}},
            r"^stages\.finetune\.batch_norm: 'fold' is not valid: the network has no batch normalisation; valid: keep$",
        ),
        (
            {"stages__finetune__batch_norm": "keep"},
            r"^stages\.finetune\.rescale: 'new_layers' is not valid: 2 normalisations undo every scale; set "
            r"batch_norm: fold, and task\.norm: none if the head has hidden layers; valid: none$",
        ),
        (
            {"stages__finetune__task": {**HEAD, "norm": "batch"}},
            r"^stages\.finetune\.rescale: 'new_layers' is not valid: 2 normalisations undo every scale",
        ),
        (
            {"stages__finetune__batch_norm": "drop"},
            r"stages\.finetune\.batch_norm: .*keep.*fold",
        ),
    ],
)
def test_start_that_does_not_fit_the_network_is_a_one_line_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as told:
        preflight.check_recipe(recipes.recipe(tmp_path, **{**RESCALED, **changes}))
    assert "\n" not in str(told.value)
