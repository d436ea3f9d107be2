"""Files of `conf`, the recipe, its defaults and overrides become one recipe."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.load import hash_json, load_recipe, parse_recipe
from firstlight.pipeline.errors import UserError
from tests.support.paths import ROOT, WITHOUT_ROOT

DIGITS = ROOT / "conf/recipe/digits.yaml"


@pytest.mark.parametrize("file", sorted((ROOT / "conf/recipe").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_recipe_survives_dump_and_load(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, (f"dataset.root={tmp_path}",) if file.stem not in WITHOUT_ROOT else ())
    assert parse_recipe(recipe.dump()) == recipe
    assert recipe.name == file.stem
    again = tmp_path / "conf.yaml"
    again.write_text(yaml_reader.dump_yaml(recipe.dump()))
    assert load_recipe(again) == recipe


def test_recipe_replaces_keys_of_conf_files_and_overrides_replace_both() -> None:
    recipe = load_recipe(DIGITS, ("dataset.image_size=12",))
    assert recipe.dataset.source == "digits"
    assert recipe.dataset.image_size == 12
    nat = recipe.stages["pretrain"].method  # type: ignore[union-attr]
    assert (nat.dim, nat.permutation_period) == (64, 3)


def test_1e_3_is_a_number_for_the_optimizer() -> None:
    stage = load_recipe(DIGITS, ("stages.pretrain.optimizer.lr=1e-3",)).stages["pretrain"]
    assert stage.optimizer.lr == 0.001  # type: ignore[union-attr]


def test_hash_depends_on_values_not_on_key_order() -> None:
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 1.5})


STUDY = """
name: study
dataset: digits
encoder: {name: convnet}
scale: local
defaults:
  pretrain: {epochs: 3, batch_size: 32, optimizer: {name: SGD, lr: 0.1, momentum: 0.9}}
stages:
  one: {kind: pretrain, method: nat}
  two: {kind: pretrain, method: nat, epochs: 5, optimizer: {lr: 0.2}}
  three: {kind: pretrain, method: nat, optimizer: {name: Adam, lr: 0.001}}
"""


def test_stages_start_from_the_defaults_of_their_kind(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    recipe = load_recipe(file, ("defaults.pretrain.batch_size=64", "stages.one.method.dim=32", "scale.workers=2"))
    assert recipe.stages["one"].method.dim == 32  # type: ignore[union-attr]
    stages: Any = recipe.stages
    assert [stage.epochs for stage in stages.values()] == [3, 5, 3]
    assert {stage.batch_size for stage in stages.values()} == {64}
    assert [stage.optimizer.lr for stage in stages.values()] == [0.1, 0.2, 0.001]
    assert stages["two"].optimizer.arguments() == {"momentum": 0.9}
    assert stages["three"].optimizer.arguments() == {}, (
        "another optimiser takes the place of the default, with all that is in it"
    )
    assert parse_recipe(recipe.dump()) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("defaults.pretrian.epochs=1", "defaults.pretrian: no such kind of stage; did you mean 'pretrain'?"),
        ("defaults=3", "defaults: must contain one section for each kind"),
        ("defaults.pretrain.epohs=1", "epohs: unknown key"),
    ],
)
def test_wrong_defaults_are_named(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    with pytest.raises(UserError) as caught:
        load_recipe(file, (override,))
    assert message in str(caught.value)


def test_method_file_may_configure_another_method() -> None:
    """instance.yaml and and.yaml are settings of super_and."""
    for name in ("instance", "and"):
        stage: Any = load_recipe(DIGITS, (f"stages.pretrain.method={name}",)).stages["pretrain"]
        assert stage.method.name == "super_and"
        assert not stage.method.aug


def test_smoke_run_has_a_name_and_registered_models_of_its_own() -> None:
    recipe: Any = load_recipe(DIGITS, smoke=True)
    assert recipe.name == "digits-smoke"
    assert recipe.seeds == (0,)
    assert recipe.scale.workers == 0
    assert recipe.stages["pretrain"].register_as == "digits-nat-smoke"
    assert recipe.stages["pretrain"].epochs == 1


def test_recipe_without_smoke_has_no_trial_run(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    with pytest.raises(UserError, match="smoke: is missing"):
        load_recipe(file, smoke=True)
