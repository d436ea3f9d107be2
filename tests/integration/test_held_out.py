"""The measurements of a pretraining on images that it was not trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.artifacts.companions import load_decoder
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.learner import Batch
from firstlight.tasks.pretrain.dae import DenoisingAutoEncoder
from firstlight.tasks.pretrain.method import TrainingInfo
from firstlight.tasks.reconstruction import undo_normalisation
from tests.support import recipes, references

DAE = {"name": "dae", "corruption": "small_blocks", "norm": "batch"}


def pretrained(folder: Path, store: Store, **keys: Any) -> tuple[StageContext, dict[str, Any]]:
    context = StageContext.create(
        recipes.recipe(folder, encoder__norm="batch", **{f"stages__pretrain__{k}": v for k, v in keys.items()}),
        store,
        on_ray=False,
    )
    stage: Any = context.recipe.stages["pretrain"]
    pretrain.PretrainStage().run(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))
    return context, json.loads((folder / "job" / RESULT_FILE).read_text())


def test_psnr_is_of_the_held_out_images_one_by_one_in_evaluation_mode(tmp_path: Path, digits: Store) -> None:
    context, result = pretrained(tmp_path, digits, method=DAE, batch_size=20, optimizer={"name": "Adam", "lr": 0.01})
    encoder = load_encoder(tmp_path / "job" / "encoder", 8)
    method = DenoisingAutoEncoder(encoder, TrainingInfo(120, 2, 3), corruption="small_blocks").eval()
    method.decoder.load_state_dict(load_decoder(tmp_path / "job" / "decoder").state_dict())
    found = []
    for batch in context.iterate_batches(context.splits.val, 5):
        for k in range(len(batch.ids)):
            one: Batch = batch.select_range(k, k + 1)
            with torch.no_grad():
                (reconstructed,) = method.embed(one)
            clean = undo_normalisation(encoder.input, encoder.input(one.views[0])).double()
            found.append(references.dae_psnr(clean, undo_normalisation(encoder.input, reconstructed).double()))
    assert len(found) == len(context.splits.val) > 5
    assert result["held_out"]["psnr"] == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_methods_without_held_out_measure_report_none(tmp_path: Path, digits: Store) -> None:
    assert pretrained(tmp_path, digits, epochs=1)[1]["held_out"] == {}
