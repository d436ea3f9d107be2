"""The card of a fine-tuned model has its classes, its views, its scores and code, and no path of this machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.cards.card_parts import CARD_FILE
from firstlight.pipeline.report.cards.fine_tuned_card import (
    render_model_card,
    write_exported_card,
    write_model_card,
)
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FOLDER
from firstlight.pipeline.stages.score_rows import score_rows
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.exported_models import export_model
from tests.support.saved_models import save_small_model
from tests.support.stage_results import finished


def result_of(seed: int) -> dict[str, Any]:
    def arm(accuracy: float) -> dict[str, Any]:
        return {"lr": 0.1, "val": 0.5, "test": accuracy, "scores": {"test": {"accuracy": accuracy}}}

    return {"labels": 40, "tried": {}, "pretrained": arm(0.75 + seed / 10), "scratch": arm(0.25)}


def tuned(tmp_path: Path, store: Store, name: str = "classify", **options: Any) -> tuple[StageContext, StageInstance]:
    context = StageContext.create(recipes.recipe(tmp_path, seeds=[0, 1]), store, on_ray=False)
    instance = finished(tmp_path, "finetune", 0, result_of(0))
    save_small_model(instance.folder / MODEL_FOLDER, name, **options)
    return context, instance


def test_card_is_written_once_beside_the_model(tmp_path: Path, digits: Store) -> None:
    context, instance = tuned(tmp_path, digits)
    text = write_model_card(context, instance, [], [], {"finetune": "runs:/1"})
    assert text == (instance.folder / MODEL_FOLDER / CARD_FILE).read_text("utf-8")
    assert write_model_card(context, instance, [], [], {"finetune": "runs:/1"}) is None


def test_card_has_classes_views_and_code(tmp_path: Path, digits: Store) -> None:
    options = {"seen": {"views": (({"op": "center_crop", "scale": 0.8},),), "levels": {"16-bit grey": (0.0, 4095.0)}}}
    context, instance = tuned(tmp_path, digits, **options)
    text = render_model_card(context, instance.folder / MODEL_FOLDER, instance, [], [], {"finetune": "runs:/1"})
    for part in (
        "in the order of its outputs: `bee`, `cat`, `dog`.",
        'pipeline_tag: "image-classification"',
        '`[{"op": "center_crop", "scale": 0.8}]`',
        "| 16-bit grey | black is 0, white is 4095 |",
        "| `lr` | `0.1` |",
        "firstlight predict model image.jpg",
        'fl.load_model("model")',
        "Not measured",
        "| finetune | `runs:/1` |",
        digits.hash,
        "was learned from another store, `s`",
    ):
        assert part in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("name", "seen", "part"),
    [
        ("multilabel", {}, "any number of which an image may show"),
        ("segment", {"windows": {"scale": 0.5, "size": None}}, "square windows that cover the image"),
        ("detect", {}, 'pipeline_tag: "object-detection"'),
    ],
)
def test_card_says_what_the_task_answers(
    tmp_path: Path, digits: Store, name: str, seen: dict[str, Any], part: str
) -> None:
    context, instance = tuned(tmp_path, digits, name, seen=seen)
    assert part in render_model_card(context, instance.folder / MODEL_FOLDER, instance, [], [], {})


def test_scores_are_those_of_its_arm_and_seed_with_the_gain_of_all_seeds(tmp_path: Path, digits: Store) -> None:
    context, instance = tuned(tmp_path, digits)
    siblings = [instance, finished(tmp_path, "finetune", 1, result_of(1))]
    rows = score_rows(context.recipe, siblings)
    folder = instance.folder / MODEL_FOLDER
    assert "Not measured" in render_model_card(context, folder, instance, [], rows, {})
    own = [replace(row, arm="scratch") for row in rows]
    text = render_model_card(context, folder, instance, siblings, own, {})
    assert "| 75.00 | 25.00 (scratch) | +55.00 over 2" in text
    assert "| 75.00" not in render_model_card(context, folder, instance, siblings, rows, {}), "the arm is scratch"


def test_card_of_an_export_has_code_and_sums_of_every_format(tmp_path: Path, digits: Store) -> None:
    save_small_model(tmp_path / "model", "detect")
    context, instance = export_model(tmp_path, digits, tmp_path / "model", 32)
    text = write_exported_card(context, instance, [], [], {})
    assert text is not None
    assert "### Firstlight" in text
    assert "Not as ONNX: the detectors of torchvision choose boxes by their values" in text
    result = instance.result
    assert result is not None
    assert result["formats"]["safetensors"]["files"]["task.json"]["sha256"] in text


def test_licence_of_weights_governs_the_model_that_comes_from_them(tmp_path: Path, digits: Store) -> None:
    origin = {"source": "hf-hub:owner/name", "licence": "mit"}
    context, instance = tuned(tmp_path, digits, facts={"arm": "pretrained", "weights": origin})
    text = render_model_card(context, instance.folder / MODEL_FOLDER, instance, [], [], {})
    for part in ('license: "mit"', 'base_model: "owner/name"', "their licence governs it: `mit`"):
        assert part in text


def test_names_of_classes_are_no_markup(tmp_path: Path, digits: Store) -> None:
    classes = ("a`b", "<script>alert(1)</script>", "c|d\n# e")
    context, instance = tuned(tmp_path, digits, classes=classes)
    text = render_model_card(context, instance.folder / MODEL_FOLDER, instance, [], [], {})
    assert "``a`b``, `<script>alert(1)</script>`, `c|d\\n# e`." in text
