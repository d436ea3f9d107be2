"""Mistakes in recipes become lines with the dotted key, the value and what is valid."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.config.load import load_recipe, parse_recipe
from firstlight.pipeline.errors import UserError
from tests.support import recipes
from tests.support.paths import ROOT

DIGITS = ROOT / "conf/recipe/digits.yaml"

# override -> parts of the message
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
        "stages.finetune: labels_per_class: 10, labels_fraction: 0.01: "
        "only one of labels_per_class, labels_fraction, labels_subset can be given",
    ],
    "stages.pretrain.labels_fraction=1.5": ["stages.pretrain.labels_fraction: 1.5", "less than or equal to 1"],
    "stages.pretrain.labels_fraction=0": ["stages.pretrain.labels_fraction: 0", "greater than 0"],
    "stages.pretrain.labels_subset=''": ["stages.pretrain.labels_subset", "at least 1 character"],
    "stages.pretrain.epochs=ten": ['stages.pretrain.epochs: "ten"', "valid integer"],
    "stages.pretrain.epochs=2.5": ["stages.pretrain.epochs: 2.5", "valid integer"],
    "stages.pretrain.epochs=true": ["stages.pretrain.epochs: true", "valid integer"],
    "stages.pretrain.epochs=0": ["stages.pretrain.epochs: 0", "greater than or equal to 1"],
    "stages.pretrain.steps=0": ["stages.pretrain.steps: 0", "greater than or equal to 1"],
    "stages.pretrain.steps=9000": [
        "stages.pretrain: epochs: 30 and steps: 9000 are both given; valid: one of them, and null for the other "
        "(stages.pretrain.steps=null or stages.pretrain.epochs=null)",
    ],
    "stages.finetune.epochs=null": ["stages.finetune: neither epochs nor steps is given; valid: one of them"],
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
    "stages.pretrain.precision=fp8": ['stages.pretrain.precision: "fp8"', "'fp32', 'bf16', 'fp16' or 'auto'"],
    "stages.evaluate.kind=score": [
        "stages.evaluate.kind: 'score' is unknown",
        "embed, evaluate, export, finetune, pretrain, reconstruct, retrieve",
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
    "name.first=x": ["name: is the value 'digits', not a section"],
    "scale.workers": ["'scale.workers': an override must be key=value"],
    "storage=[": ["storage:"],
    "storage=*anchor": ["storage:", "aliases"],
}


@pytest.mark.fault(23, "names that lead out of their folder")
@pytest.mark.fault(44, "wrong keys, values and types")
@pytest.mark.parametrize("override", WRONG, ids=list(WRONG))
def test_wrong_override_is_one_line_with_key_value_and_valid_values(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(DIGITS, (override,))
    assert len(str(caught.value).splitlines()) == (sum("is missing" in part for part in WRONG[override]) or 1)
    for part in WRONG[override]:
        assert part in str(caught.value)


@pytest.mark.fault(44, "two mistakes")
def test_every_mistake_has_a_line() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(DIGITS, ("stages.pretrain.epochs=0", "scale.workers=-1"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.fault(44, "any value in the place of a section")
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), st.lists, max_leaves=3),
    )
)
def test_any_value_of_a_section_raises_usererror_or_loads(raw: dict[str, object]) -> None:
    with pytest.raises(UserError):
        parse_recipe({**load_recipe(DIGITS).dump(), "scale": raw})


def test_wrong_list_elements_are_not_also_reported_as_an_empty_list(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        recipes.recipe(
            tmp_path, stages={"export": {"kind": "export", "encoder": "models:/x@current", "formats": ["caffe"]}}
        )
    (line,) = str(error.value).splitlines()
    assert line.startswith('stages.export.formats.0: "caffe" is not valid')


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**40, -(2**63)])
def test_seed_of_more_than_64_bits_is_a_one_line_error(tmp_path: Path, seed: int) -> None:
    with pytest.raises(UserError, match=rf"^seeds\.1: .* is not valid: integers are at most {2**63 - 1}$"):
        recipes.recipe(tmp_path, seeds=[0, seed])
    assert recipes.recipe(tmp_path, seeds=[2**63 - 1]).seeds == (2**63 - 1,)


def test_number_of_more_than_64_bits_is_refused_in_any_section(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        recipes.recipe(tmp_path, stages__pretrain__epochs=2**64, dataset__image_size=10**50, stages__pretrain__lr=1)
    assert str(told.value).splitlines() == [
        f"dataset.image_size: an integer of more than 30 digits is not valid: integers are at most {2**63 - 1}",
        f"stages.pretrain.epochs: {2**64} is not valid: integers are at most {2**63 - 1}",
    ]


@pytest.mark.parametrize("changes", [{"description": "a\ud800"}, {"dataset__root": "/x/\udcff"}])
def test_text_that_is_not_unicode_is_named(tmp_path: Path, changes: dict[str, str]) -> None:
    (key,) = (key.replace("__", ".") for key in changes)
    with pytest.raises(UserError, match=rf"^{key}: '.*\\u[d8cf0]+' is not valid: it has half of a surrogate pair"):
        recipes.recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    "override",
    [
        r'name="a\n"',
        r'dataset.name="digits\n"',
        r'stages.pretrain.register_as="a\n"',
        r'stages.finetune.encoder="models:/a\n"',
    ],
)
def test_text_with_a_newline_at_its_end_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"^[\w.]+: .*"):
        load_recipe(DIGITS, (override,))


def test_many_mistakes_are_summed_up(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        recipes.recipe(tmp_path, seeds=["x"] * 500)
    lines = str(told.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 480 more mistakes"
