"""The lines that say where the outputs of a stage are."""

from pathlib import Path

import pytest

from firstlight.pipeline.report import stage_outputs
from tests.support import recipes
from tests.support.stage_results import finished

STAGES = {
    "embed": ("embeddings", "embeddings", "fl.open_embeddings"),
    "retrieve": ("index", "index", "fl.open_index"),
    "export": ("exported encoder", "export", "card.md"),
}


@pytest.mark.parametrize("kind", STAGES)
def test_line_names_the_folder_and_the_code_that_opens_it(tmp_path: Path, kind: str) -> None:
    name, folder, usage = STAGES[kind]
    stage = recipes.recipe(tmp_path, **{f"stages__{kind}": {"kind": kind}}).stages[kind]
    (line,) = stage_outputs.describe_outputs(stage, [finished(tmp_path, kind, 3, {})])
    assert line.startswith(f"{name}: {tmp_path / f'{kind}-3' / folder}  ")
    assert usage in line


def test_encoder_is_opened_from_its_run_or_else_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = recipes.recipe(tmp_path).stages["pretrain"]
    instances = [finished(tmp_path, "pretrain", seed, {}) for seed in (0, 1)]
    folder = instances[0].folder / "encoder"
    for run_id, reference in ((None, folder), ("abc", "runs:/abc/encoder")):
        monkeypatch.setattr(stage_outputs, "read_run_id", lambda folder, found=run_id: found)
        assert stage_outputs.describe_outputs(stage, instances) == [
            f'encoder (seed 0; 1 more): {folder}  fl.load_encoder("{reference}")'
        ]


def test_unfinished_stage_has_no_lines(tmp_path: Path) -> None:
    stage = recipes.recipe(tmp_path).stages["pretrain"]
    assert stage_outputs.describe_outputs(stage, [finished(tmp_path, "pretrain", 0, None)]) == []
