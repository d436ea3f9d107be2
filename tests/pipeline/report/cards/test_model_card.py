"""A model card names the method, the budget, the scores and the licence, and is written once."""

from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import write_json
from firstlight.pipeline.report.cards import model_card
from firstlight.pipeline.report.cards.card_parts import CARD_FILE
from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.export import EXPORT_FOLDER
from firstlight.pipeline.stages.score_rows import score_rows
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes
from tests.support.stage_results import evaluated, finish_arms, finished

RESULT = {"image_size": 8, "map": [8, 2, 2], "formats": {}, "left_out": {"timm": "no such network"}}


def exported(tmp_path: Path, store: Store, **changes: Any) -> tuple[StageContext, StageInstance]:
    """Returns the context and the finished export of a fresh encoder, from a recipe that also pretrains."""
    recipe = recipes.recipe(tmp_path, stages__export={"kind": "export"}, **changes)
    torch.manual_seed(0)
    facts = {"method": recipe.stages["pretrain"].model_dump(mode="json")["method"], "store": store.hash, "seed": 0}
    save_encoder(Encoder(recipe.network_spec, 8), tmp_path / "encoder", facts)
    instance = StageInstance("export", 0, "f", tmp_path / "export", tmp_path / "encoder")
    (instance.folder / EXPORT_FOLDER).mkdir(parents=True)
    write_json(instance.folder / RESULT_FILE, RESULT)
    return StageContext.create(recipe, store, on_ray=False), instance


def test_card_is_written_only_if_its_text_changes(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits)
    text = model_card.write_card(context, instance, [], [], {"encoder": "runs:/1"})
    assert text is not None
    assert (instance.folder / EXPORT_FOLDER / CARD_FILE).read_text("utf-8") == text
    assert model_card.write_card(context, instance, [], [], {"encoder": "runs:/1"}) is None
    assert "runs:/2" in (model_card.write_card(context, instance, [], [], {"encoder": "runs:/2"}) or "")


def test_card_has_method_budget_data_and_reasons_but_no_path(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits)
    text = model_card.render_card(context, instance, [], [], {})
    for part in (
        "| `epochs` | `2` |",
        "No label was seen.",
        digits.hash,
        "Not measured",
        "Not as timm: no such network.",
    ):
        assert part in text
    assert str(tmp_path) not in text


def test_encoder_of_a_fine_tuning_names_its_task_and_start(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits)
    facts = {"task": {"name": "classify", "train": "all"}, "arm": "scratch", "store": digits.hash, "seed": 3}
    assert instance.encoder is not None
    save_encoder(Encoder(context.recipe.network_spec, 8), instance.encoder, facts)
    text = model_card.render_card(context, instance, [], [], {})
    for part in ("With labels, by a fine-tuning from `scratch`, with seed 3", '| `name` | `"classify"` |'):
        assert part in text
    assert "No label was seen" not in text
    assert "self-supervised" not in text


def test_length_in_steps_is_shown_in_steps_alone(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits, stages__pretrain__epochs=None, stages__pretrain__steps=1234)
    text = model_card.render_card(context, instance, [], [], {})
    assert "| `steps` | `1234` |" in text
    assert "| `epochs` |" not in text


def test_labels_of_a_semi_supervised_training_are_mentioned(tmp_path: Path, digits: Store) -> None:
    labels = {"stages__pretrain__labelled_per_batch": 8, "stages__pretrain__labels_per_class": 4}
    method = {"stages__pretrain__method": {"name": "clustering_locality"}}
    context, instance = exported(tmp_path, digits, **labels, **method)
    text = model_card.render_card(context, instance, [], [], {})
    assert "Labels were seen" in text
    assert "| `labelled_per_batch` | `8` |" in text


def test_scores_are_those_of_the_same_seed_with_the_gain_over_all_seeds(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits, seeds=[0, 1])
    siblings = [finished(tmp_path, "evaluate", seed, evaluated(seed / 10)) for seed in (0, 1)]
    rows = score_rows(context.recipe, siblings)
    text = model_card.render_card(context, instance, siblings, rows, {})
    row = next(line for line in text.splitlines() if line.startswith("| evaluate |"))
    assert "| 50.00 | 10.00 (random" in row
    assert "+40.00 over 2" in row


def test_scores_of_given_weights_are_not_called_those_of_this_encoder(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits, seeds=[0, 1, 2], encoder__weights="/weights.safetensors")
    siblings = finish_arms(tmp_path, "evaluate")
    text = model_card.render_card(context, instance, siblings, score_rows(context.recipe, siblings), {})
    cells = [line.split(" | ")[1:4] for line in text.splitlines() if line.startswith("| evaluate | kNN")]
    assert cells == [
        ["kNN (k=5), against given", "82.00", "81.00 (given weights)"],
        ["kNN (k=5)", "82.00", "41.00 (random weights)"],
    ]


def test_existing_weights_are_reported_and_their_licence_governs(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits, encoder__weights="/my/weights.pth", encoder__licence="cc-by-nc-4.0")
    assert instance.encoder is not None
    facts = {"method": {"name": "nat"}, "weights": {"source": "weights.pth", "sha256": "ab12"}, "seed": 0}
    save_encoder(Encoder(context.recipe.network_spec, 8), instance.encoder, facts)
    text = model_card.render_card(context, instance, [], [], {})
    assert 'license: "cc-by-nc-4.0"' in text
    section = text[text.index("## Licence and limits") :]
    for part in ("their licence governs it: `cc-by-nc-4.0`", "| source | `weights.pth` |", "| `ab12` |"):
        assert part in section
    assert "/my/" not in text
    assert "licence of these weights is unknown" not in text


def test_weights_as_they_came_were_not_learned_here(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits, encoder__weights="/my/weights.pth", stages__export__encoder="given")
    assert instance.encoder is not None
    save_encoder(Encoder(context.recipe.network_spec, 8), instance.encoder, {"weights": {"sha256": "ab12"}})
    text = model_card.render_card(context, instance, [], [], {})
    for part in (
        "existing weights as they came",
        "| source | `weights.pth` |",
        'license: "unknown"',
        ", existing weights\n",
    ):
        assert part in text
    assert "self-supervised" not in text
    assert "is not known here" in text


def test_network_from_fresh_weights_has_the_licence_of_none(tmp_path: Path, digits: Store) -> None:
    context, instance = exported(tmp_path, digits)
    text = model_card.render_card(context, instance, [], [], {})
    assert 'license: "unknown"' in text
    assert "licence of these weights is unknown" in text[text.index("## Licence and limits") :]


def test_folder_of_timm_is_described_as_timm_loads_it(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"version": "1", "files": {"config.json": {}}}
    assert "hf-hub:" in model_card.describe_format("timm", facts)
    assert "features_only" in model_card.describe_format("timm", {**facts, "gives_maps": True})
    told = model_card.describe_format("timm", {"version": "1", "files": {}, "not_by_name": "no `head`"})
    assert "cannot load the folder by its name: `` no `head` ``" in told
    assert "hf-hub:" not in told
