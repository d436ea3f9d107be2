"""The index of figures: a damaged one, or one of another shape, is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.figures import FIGURES_INDEX, list_figures


@pytest.mark.parametrize(
    "index", [{}, 3, [1], [{"name": "b"}], [{"name": "../../secret", "title": "", "alt": ""}], [{"name": 1}]]
)
def test_index_of_another_shape_is_named(tmp_path: Path, index: Any) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "figures" / FIGURES_INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"^{tmp_path}/figures/index\.json: is damaged: "):
        list_figures(tmp_path)
