"""Names and aliases in the model registry for encoders."""

from pathlib import Path

import pytest

from firstlight.pipeline.cli.promote import find_pretraining, promote_encoder
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.lineage import Lineage, read_lineage
from firstlight.pipeline.tracking.location import parse_location
from firstlight.pipeline.tracking.references import find_source_run, pin_reference
from tests.support.mlflow_runs import Past, chain


def test_promoting_twice_makes_one_version_that_recipes_can_take(tmp_path: Path) -> None:
    past, run_ids = chain(tmp_path)
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    run = lineage.runs[run_ids["pretrain1"]]
    for _ in range(2):
        assert promote_encoder(lineage, client, run, "best", "current") == "models:/best@current"
    assert [v.version for v in client.search_model_versions("name='best'")] == [1]
    assert (
        find_source_run(past.tracking, pin_reference(past.tracking, "models:/best@current", "x"))
        == run_ids["pretrain1"]
    )


def test_trial_is_promoted_by_its_pretraining(tmp_path: Path) -> None:
    past = Past(tmp_path)
    search = past.recipe("temperature", kind="search")
    trial = past.recipe("trial-0", search, kind="trial")
    pretrained = past.pretrain("trial-0", trial)
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert promote_encoder(lineage, client, lineage.runs[trial], "best", "chosen") == "models:/best@chosen"
    assert read_lineage(parse_location([f"storage={tmp_path}"]))[0].find_run("models:/best@chosen").id == pretrained


def test_fine_tuned_model_has_a_reference_and_is_promoted(tmp_path: Path) -> None:
    past = Past(tmp_path)
    run_id = past.finetune("first", past.recipe("first"))
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert lineage.encoder_reference(lineage.runs[run_id]) == f"runs:/{run_id[:8]}/model"
    assert promote_encoder(lineage, client, lineage.runs[run_id], "tuned", "best") == "models:/tuned@best"
    again = read_lineage(parse_location([f"storage={tmp_path}"]))[0]
    assert again.encoder_reference(again.runs[run_id]) == "models:/tuned@best"


def test_recipe_is_promoted_by_its_first_seed(lineage: Lineage, run_ids: dict[str, str]) -> None:
    assert find_pretraining(lineage, lineage.runs[run_ids["first"]]).id == run_ids["pretrain0"]


@pytest.mark.parametrize(
    ("run", "name", "message"),
    [
        ("evaluate0", "best", "makes no encoder"),
        ("second", "best", "has several pretrainings or none"),
        ("pretrain1", "a/b", "--name: 'a/b' is not valid"),
    ],
)
def test_refusals_name_the_mistake(
    lineage: Lineage, run_ids: dict[str, str], run: str, name: str, message: str
) -> None:
    _, client = read_lineage(lineage.location)
    with pytest.raises(UserError, match=message):
        promote_encoder(lineage, client, lineage.runs[run_ids[run]], name, "current")


def test_unfinished_pretraining_has_no_encoder(tmp_path: Path) -> None:
    past = Past(tmp_path)
    pretrained = past.pretrain("first", past.recipe("first"))
    past.client.update_run(pretrained, status="FAILED")
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    with pytest.raises(UserError, match="has not finished"):
        promote_encoder(lineage, client, lineage.runs[pretrained], "best", "current")
