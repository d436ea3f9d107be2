"""Wrong inputs end in one line that names the dotted key, the value and what is valid; right ones in a frozen config."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from firstlight.pipeline.config import recipe as config
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.recipe import load, parse
from firstlight.pipeline.errors import UserError
from tests.support import recipes
from tests.support.paths import ROOT

QUICKSTART = ROOT / "conf/recipe/quickstart.yaml"

# override -> what the one line must say
WRONG = {
    "scale.workrs=2": ["scale.workrs: unknown key", "did you mean 'workers'?"],
    "stages.pretrain.method.dimm=3": ["stages.pretrain.method.dimm: unknown key", "did you mean 'dim'?"],
    "encoder.widht=3": ["encoder.widht: unknown key", "did you mean 'width'?"],
    "dataset.train_augment=[{op: random_shift, pading: 3}]": [
        "dataset.train_augment.0.pading: unknown key",
        "did you mean 'padding'?",
    ],
    "nmae=x": ["nmae: unknown key", "did you mean 'name'?"],
    "stages.pretrian.epochs=2": ["stages.pretrian: no such stage", "did you mean 'pretrain'?"],
    "stages.finetune.labels_fraction=0.01": [
        "stages.finetune: labels_per_class: 10, labels_fraction: 0.01: only one of labels_per_class, labels_fraction, labels_subset can be given",
    ],
    "stages.pretrain.labels_fraction=1.5": ["stages.pretrain.labels_fraction: 1.5", "less than or equal to 1"],
    "stages.pretrain.labels_fraction=0": ["stages.pretrain.labels_fraction: 0", "greater than 0"],
    "stages.pretrain.labels_subset=''": ["stages.pretrain.labels_subset", "at least 1 character"],
    "stages.pretrain.epochs=ten": ['stages.pretrain.epochs: "ten"', "valid integer"],
    "stages.pretrain.epochs=2.5": ["stages.pretrain.epochs: 2.5", "valid integer"],
    "stages.pretrain.epochs=true": ["stages.pretrain.epochs: true", "valid integer"],
    "stages.pretrain.epochs=0": ["stages.pretrain.epochs: 0", "greater than or equal to 1"],
    "stages.pretrain.optimizer.lr=-1": ["stages.pretrain.optimizer.lr: -1", "greater than 0"],
    "stages.pretrain.optimizer.lr=.inf": ["stages.pretrain.optimizer.lr", "valid number"],
    "stages.pretrain.optimizer.name=SDG": ["'SDG' is unknown", "did you mean 'SGD'?"],
    "stages.pretrain.optimizer.momentm=0.9": [
        "stages.pretrain.optimizer: momentm is not a parameter of SGD",
        "did you mean 'momentum'?",
    ],
    "stages.pretrain.optimizer.momentum=high": ["stages.pretrain.optimizer: SGD refuses", "high"],
    "stages.pretrain.schedule.name=CosineLR": ["'CosineLR' is unknown", "did you mean 'CosineAnnealingLR'?"],
    "stages.pretrain.schedule={name: hyperbolic, t0: 3}": [
        "stages.pretrain.schedule: hyperbolic takes t0 and gamma",
        "['t0']",
    ],
    "stages.pretrain.method.dim=1": ["stages.pretrain.method.dim: 1", "greater than or equal to 2"],
    "stages.pretrain.method.targets=cube": ['stages.pretrain.method.targets: "cube"', "'sphere' or 'one_hot'"],
    "stages.pretrain.method.name=natt": ["stages.pretrain.method.name: 'natt' is unknown", "did you mean 'nat'?"],
    "stages.pretrain.precision=fp8": ['stages.pretrain.precision: "fp8"', "'fp32' or 'bf16'"],
    "stages.evaluate.kind=score": [
        "stages.evaluate.kind: 'score' is unknown",
        "embed, evaluate, export, finetune, pretrain, retrieve",
    ],
    "stages.finetune.encoder=best": ['stages.finetune.encoder: "best"', "runs:/"],
    "dataset.name=cifr10": ["dataset.name: 'cifr10' is unknown", "did you mean 'cifar10'?"],
    "dataset.source=folder": ["dataset", "dataset.root"],
    "dataset.val_fraction=1.0": ["dataset.val_fraction: 1", "less than 1"],
    "dataset.train_augment=[{op: horizontal_flip}]": ["dataset.train_augment", "must start with exactly one of"],
    "encoder.name=resnet": ["encoder.name: 'resnet' is unknown", "resnet18"],
    "encoder.std=[0, 1, 1]": ["encoder.std.0: 0", "greater than 0"],
    "scale.workers=-1": ["scale.workers: -1", "greater than or equal to 0"],
    "scale=5": ["scale: 5", "object"],
    "seeds=[]": ["seeds: []", "at least 1 item"],
    "seeds=[1, 1]": ["seeds: [1, 1]", "repeat"],
    "dataset={name: mine, source: digits}": ["dataset.train_augment: is missing", "dataset.eval_augment: is missing"],
    "dataset={name: ../up}": ["dataset.name: '../up' is unknown"],
    "name=../elsewhere": ['name: "../elsewhere"', "pattern"],
    "name=a..b": ['name: "a..b"', "'..'"],
    "name.first=x": ["name: is the value 'quickstart', not a section"],
    "scale.workers": ["'scale.workers': an override is key=value"],
    "storage=[": ["storage:"],
    "storage=*anchor": ["storage:", "aliases"],
}


@pytest.mark.fault(23, "names that lead out of their folder")
@pytest.mark.fault(44, "wrong keys, values and types")
@pytest.mark.parametrize("override", WRONG, ids=list(WRONG))
def test_a_wrong_override_is_one_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(QUICKSTART, (override,))
    assert len(str(caught.value).splitlines()) == sum("is missing" in part for part in WRONG[override]) or 1
    for part in WRONG[override]:
        assert part in str(caught.value)


def parsed(raw: dict[str, Any]) -> tuple[config.Recipe | None, str]:
    """The recipe, or what is wrong with it."""
    try:
        return parse(raw), ""
    except UserError as error:
        return None, str(error)


NAMES = st.text(max_size=300) | st.sampled_from(
    ["..", ".", "a/b", "/", "", "a" * 300, "a\n", "a\x00", "~", "\N{LATIN SMALL LETTER E WITH ACUTE}"]
)


@pytest.mark.fault(23, "any text as a name of a recipe, a stage, a dataset or a model")
@given(NAMES, st.sampled_from(["name", "stage", "dataset", "register_as"]))
def test_a_name_is_refused_by_its_key_or_stays_below_the_storage(name: str, where: str) -> None:
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


@pytest.mark.fault(45, "a key that stands twice")
@pytest.mark.fault(46, "!!python and aliases")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2 the key 'name' stands twice"),
        ("name: [a\n", "expected ',' or ']'"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("1: a\n", "the key '1' must be a text"),
        ("", "must be a mapping"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(file)
    assert len(str(caught.value).splitlines()) == 1
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.fault(44, "two mistakes")
def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load(QUICKSTART, ("stages.pretrain.epochs=0", "scale.workers=-1"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.fault(45, "1e-3, 010, yes, 12:30")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2.5e+1", -25.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("010", 10),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("~", None),
        ("true", True),
    ],
)
def test_scalars_are_what_people_mean(text: str, value: object) -> None:
    found = yaml_reader.parse(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_1e_3_reaches_the_optimizer_as_a_number() -> None:
    stage = load(QUICKSTART, ("stages.pretrain.optimizer.lr=1e-3",)).stages["pretrain"]
    assert stage.optimizer.lr == 0.001  # type: ignore[union-attr]


@pytest.mark.parametrize("file", sorted((ROOT / "conf/recipe").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_loads_and_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    recipe = load(file, (f"dataset.root={tmp_path}",) if file.stem != "quickstart" else ())
    assert parse(recipe.dump()) == recipe
    assert recipe.name == file.stem
    again = tmp_path / "conf.yaml"
    again.write_text(yaml_reader.dump(recipe.dump()))
    assert load(again) == recipe


def test_groups_are_laid_under_the_recipe_and_overrides_over_it() -> None:
    recipe = load(QUICKSTART, ("dataset.image_size=12",))
    assert recipe.dataset.source == "digits"
    assert recipe.dataset.image_size == 12
    nat = recipe.stages["pretrain"].method  # type: ignore[union-attr]
    assert (nat.dim, nat.permutation_period) == (64, 3)


def test_a_config_cannot_be_changed() -> None:
    recipe = load(QUICKSTART)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.scale.workers = 5  # type: ignore[misc]


@pytest.mark.fault(44, "any value in the place of a section")
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), st.lists, max_leaves=3),
    )
)
def test_no_value_is_a_crash(raw: dict[str, object]) -> None:
    with pytest.raises(UserError):
        parse({**load(QUICKSTART).dump(), "scale": raw})


def test_the_command_line_ends_with_code_2_and_one_line() -> None:
    command = [sys.executable, "-m", "pipeline", "config", str(QUICKSTART), "scale.workrs=2"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.splitlines() == [str(line) for line in answer.stderr.splitlines()][:1]
    assert answer.stderr.startswith("error: scale.workrs: unknown key")


def test_digests_tell_values_apart() -> None:
    assert config.digest({"a": 1, "b": [2]}) == config.digest({"b": [2], "a": 1})
    assert config.digest({"a": 1}) != config.digest({"a": 1.5})


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


def test_defaults_are_laid_under_every_stage_of_their_kind(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    recipe = load(file, ("defaults.pretrain.batch_size=64", "stages.one.method.dim=32", "scale.workers=2"))
    assert recipe.stages["one"].method.dim == 32  # type: ignore[union-attr]
    stages: Any = recipe.stages
    assert [stage.epochs for stage in stages.values()] == [3, 5, 3]
    assert {stage.batch_size for stage in stages.values()} == {64}
    assert [stage.optimizer.lr for stage in stages.values()] == [0.1, 0.2, 0.001]
    assert stages["two"].optimizer.arguments() == {"momentum": 0.9}
    assert stages["three"].optimizer.arguments() == {}, (
        "another optimiser takes the place of the default, with all that is in it"
    )
    assert parse(recipe.dump()) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("defaults.pretrian.epochs=1", "defaults.pretrian: no such kind of stage; did you mean 'pretrain'?"),
        ("defaults=3", "defaults: must be sections"),
        ("defaults.pretrain.epohs=1", "epohs: unknown key"),
    ],
)
def test_wrong_defaults_are_one_line_or_one_a_stage(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    with pytest.raises(UserError) as caught:
        load(file, (override,))
    assert message in str(caught.value)


def test_a_method_of_the_conf_may_set_up_another() -> None:
    """instance.yaml and and.yaml are settings of super_and."""
    for name in ("instance", "and"):
        stage: Any = load(QUICKSTART, (f"stages.pretrain.method={name}",)).stages["pretrain"]
        assert stage.method.name == "super_and"
        assert not stage.method.aug


def test_a_list_of_mistakes_is_not_told_to_be_empty_too(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        recipes.recipe(
            tmp_path, stages={"export": {"kind": "export", "encoder": "models:/x@current", "formats": ["caffe"]}}
        )
    (line,) = str(error.value).splitlines()
    assert line.startswith('stages.export.formats.0: "caffe" is not valid')
