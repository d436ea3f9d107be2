"""The recipe: names, the order of stages, expected results, the test split."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import EncoderSource, Recipe
from firstlight.pipeline.data.mirror.places import locate_working_folder
from firstlight.pipeline.errors import UserError
from tests.support import recipes


def parsed(raw: dict[str, Any]) -> tuple[Recipe | None, str]:
    """The recipe, or what is wrong with it."""
    try:
        return parse_recipe(raw), ""
    except UserError as error:
        return None, str(error)


NAMES = st.text(max_size=300) | st.sampled_from(
    ["..", ".", "a/b", "/", "", "a" * 300, "a\n", "a\x00", "~", "\N{LATIN SMALL LETTER E WITH ACUTE}"]
)


@pytest.mark.fault(23, "any text as a name of a recipe, a stage, a dataset or a model")
@given(NAMES, st.sampled_from(["name", "stage", "dataset", "register_as"]))
def test_name_is_rejected_by_its_key_or_stays_below_the_storage(name: str, where: str) -> None:
    raw = recipes.recipe(Path("runs")).dump()
    stage = name if where == "stage" else "pretrain"
    raw["stages"] = {stage: {**raw["stages"]["pretrain"], **({"register_as": name} if where == "register_as" else {})}}
    raw |= {"name": name} if where == "name" else {}
    raw["dataset"] |= {"name": name} if where == "dataset" else {}
    found, told = parsed(raw)
    if found is None:
        key = {
            "name": "name",
            "stage": "stages",
            "dataset": "dataset.name",
            "register_as": "stages.pretrain.register_as",
        }[where]
        assert told.startswith(f"{key}: ")
        assert len(told.splitlines()) == 1
        assert len(told) < 600
        return
    root = Path("/storage")
    for below in (found.name, found.dataset.name, f"{next(iter(found.stages))}-seed0-0123456789ab"):
        path = root / below
        assert Path(os.path.normpath(path)).parent == root
        assert len(os.fsencode(path.name)) <= 255


STAGES = recipes.RECIPE["stages"]
EXPORTED = {"kind": "export", "encoder": "models:/x@current"}


def test_encoder_source_is_the_last_pretraining_before_the_stage(tmp_path: Path) -> None:
    second = {**STAGES["pretrain"], "epochs": 1}
    recipe = recipes.recipe(
        tmp_path,
        stages={**STAGES, "second": second, "export": EXPORTED, "last": {**STAGES["evaluate"], "kind": "evaluate"}},
    )
    assert recipe.encoder_source("pretrain") is None
    assert recipe.encoder_source("evaluate") == EncoderSource(stage="pretrain")
    assert recipe.encoder_source("export") == EncoderSource(reference="models:/x@current")
    assert recipe.encoder_source("last") == EncoderSource(stage="second")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"evaluate": STAGES["evaluate"]}}, "stages.evaluate.encoder: 'previous' needs a pretrain stage"),
        (
            {"expected": [{"stage": "evaluat", "measure": "knn", "paper": 1.0, "source": "t"}]},
            "expected.0.stage: 'evaluat'",
        ),
        (
            {"expected": [{"stage": "evaluate", "measure": "kn", "paper": 1.0, "source": "t"}]},
            "expected.0.measure: 'kn' is not measured by stages.evaluate; did you mean 'knn'?",
        ),
        (
            {"expected": [{"stage": "finetune", "measure": "accuracy", "arm": "he", "paper": 1.0, "source": "t"}]},
            "expected.0.arm: 'he' is no arm of stages.finetune",
        ),
        (
            {"stages": {**STAGES, "retrieve": {"kind": "retrieve"}}, "score_test": False},
            "stages.retrieve.queries: 'test' reads test images, and score_test is false; valid: val",
        ),
    ],
)
def test_contradiction_between_sections_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.recipe(tmp_path, **changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("stages", "changes", "measured"),
    [
        (["pretrain"], {}, set()),
        (["pretrain"], {"stages__pretrain__watch": {"every": 1}}, {"val"}),
        (["pretrain"], {"stages__pretrain__pictures": "test"}, {"test"}),
        (["pretrain", "evaluate"], {}, {"val", "test"}),
        (["pretrain", "finetune"], {}, {"val", "test"}),
        (["pretrain"], {"stages__retrieve": {"kind": "retrieve", "queries": "val"}}, {"val"}),
        (["pretrain"], {"stages__retrieve": {"kind": "retrieve", "queries": "val", "gallery": "all"}}, {"val", "test"}),
        (["pretrain"], {"stages__embed": {"kind": "embed"}, "stages__export": {"kind": "export"}}, set()),
        (["pretrain"], {"stages__embed": {"kind": "embed", "splits": ["test"]}}, {"test"}),
        (["pretrain"], {"score_test": False}, {"val", "test"}),
    ],
)
def test_measured_splits_are_those_of_the_stages(
    tmp_path: Path, stages: list[str], changes: dict[str, Any], measured: set[str]
) -> None:
    kept = {name: copy.deepcopy(recipes.RECIPE["stages"][name]) for name in stages}
    recipe = recipes.recipe(tmp_path, stages=kept, **changes)
    assert recipe.measured_splits == measured


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\x00", "\x85"])
def test_storage_with_control_characters_is_refused(name: str) -> None:
    found, told = parsed(recipes.recipe(Path("runs")).dump() | {"storage": f"/data/{name}"})
    assert found is None
    assert told.startswith("storage: ")
    assert "control characters" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("name", ["a b", "100%", "#1", "?x", "ü", "'q'", '"d"', "&", "+", "$HOME", "[x]", "{y}", "*"])
def test_storage_may_have_any_other_name(name: str) -> None:
    found, told = parsed(recipes.recipe(Path("runs")).dump() | {"storage": f"/data/{name}"})
    assert found is not None, told
    assert found.storage == Path(f"/data/{name}")


def test_storage_in_a_bucket_is_a_working_folder_here_and_a_uri_everywhere() -> None:
    recipe = recipes.recipe("s3://bucket/a//runs/", tracking__uri="http://host:5000")  # type: ignore[arg-type]
    assert recipe.storage == locate_working_folder("s3://bucket/a/runs")
    assert recipe.dump()["storage"] == "s3://bucket/a/runs"
    assert parse_recipe(recipe.dump()) == recipe


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("s3://bucket/runs", "storage: 's3://bucket/runs' needs tracking.uri: "),
        (
            "https://host/runs",
            "storage: \"https://host/runs\" is not valid: 'https://host/runs' cannot be written",
        ),
        ("s3:///runs", "storage: \"s3:///runs\" is not valid: 's3:///runs' is no bucket with a prefix"),
    ],
)
def test_bucket_that_cannot_be_used_is_refused(storage: str, message: str) -> None:
    found, told = parsed(recipes.recipe(Path("runs")).dump() | {"storage": storage})
    assert found is None
    assert told.startswith(message)
