"""The file of a first recipe is a recipe that runs as it is."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.preflight import check_recipe
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.starter.choices import Wishes, choose_settings
from firstlight.pipeline.starter.recipe_text import name_recipe, write_recipe
from firstlight.pipeline.starter.survey import survey_images
from firstlight.pipeline.terminal import SafeConsole
from tests.support.channel_images import write_band_folders
from tests.support.folders_of_noise import write_noise_folder

METHODS = ("and", "byol", "dae", "decoupled", "dino", "instance", "lejepa", "nat", "simclr", "super_and", "vicreg")


def write_first_recipe(folder: Path, wishes: Wishes, has_gpu: bool = False, classes: tuple[str, ...] = ()) -> Recipe:
    (folder / "images").mkdir()
    write_noise_folder(folder / "images", dict.fromkeys(classes or (".",), 20), (40, 36))
    survey = survey_images(folder / "images")
    write_recipe(folder / "mine.yaml", survey, choose_settings(survey, wishes, has_gpu))
    return load_recipe(folder / "mine.yaml")


@pytest.mark.usefixtures("networks_built_once")
@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "spatial_contrasting"])
def test_recipe_of_every_method_passes_the_checks_of_a_run(tmp_path: Path, method: str, has_gpu: bool) -> None:
    recipe = write_first_recipe(tmp_path, Wishes(method=method), has_gpu, ("a", "b"))
    assert list(recipe.stages) == ["pretrain", "evaluate", "finetune"]
    assert recipe.name == "mine"
    check_recipe(recipe.model_copy(update={"scale": recipe.scale.model_copy(update={"workers": 0})}))


@pytest.mark.parametrize(
    ("file", "name"),
    [("mine.yaml", "mine"), ("my study.v2.yaml", "my-study-v2"), ("für.yaml", "f-r"), ("__", "recipe")],
)
def test_name_of_the_recipe_is_that_of_the_file(file: str, name: str) -> None:
    assert name_recipe(Path("a") / file) == name


def test_recipe_without_labels_embeds(tmp_path: Path) -> None:
    assert list(write_first_recipe(tmp_path, Wishes()).stages) == ["pretrain", "embed"]


@pytest.mark.parametrize("classes", [(), ("a", "b")])
def test_every_stage_takes_the_number_format_that_is_the_fastest(tmp_path: Path, classes: tuple[str, ...]) -> None:
    stages = write_first_recipe(tmp_path, Wishes(), classes=classes).stages.values()
    assert {stage.precision for stage in stages} == {"auto"}  # type: ignore[attr-defined]


def test_weights_as_given_are_a_candidate_where_labels_can_tell(tmp_path: Path) -> None:
    weights = Wishes(model="test_resnet", weights="timm")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    labelled = write_first_recipe(tmp_path / "one", weights, classes=("a", "b")).stages["pretrain"]
    unlabelled = write_first_recipe(tmp_path / "two", weights).stages["pretrain"]
    assert labelled.keep == "best"  # type: ignore[attr-defined]
    assert unlabelled.keep == "last"  # type: ignore[attr-defined]


def test_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    write_noise_folder(tmp_path / "images", {"a": 9, "b": 9}, (32, 32))
    survey = survey_images(tmp_path / "images")
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.yaml: exists already; valid: another --out, or delete it$"):
        write_recipe(tmp_path / "mine.yaml", survey, choose_settings(survey, Wishes(), False))
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_comments_say_what_was_chosen(tmp_path: Path) -> None:
    write_first_recipe(tmp_path, Wishes(epochs=2), classes=("a", "b"))
    survey = survey_images(tmp_path / "images")
    text = (tmp_path / "mine.yaml").read_text()
    for reason in choose_settings(survey, Wishes(epochs=2), False).reasons:
        if not reason.startswith("size"):
            assert reason in text
    assert max(map(len, text.splitlines())) <= 150


@pytest.mark.usefixtures("undrawn_figures")
def test_first_recipe_runs_to_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_first_recipe(tmp_path, Wishes(epochs=1), classes=("a", "b"))
    changes: dict[str, Any] = {"seeds": (0,), "storage": tmp_path / "runs"}
    changes |= {"scale": recipe.scale.model_copy(update={"workers": 0})}
    changes |= {"stages": {**recipe.stages, "finetune": recipe.stages["finetune"].model_copy(update={"epochs": 2})}}
    small = recipe.model_copy(update=changes)
    rows = run_recipe(small, SafeConsole(quiet=True)).rows
    assert {row.stage for row in rows} == {"evaluate", "finetune"}


@pytest.mark.usefixtures("networks_built_once")
@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("method", ["decoupled", "super_and", "dino"])
def test_recipe_of_bands_passes_the_checks_of_a_run(tmp_path: Path, method: str, has_gpu: bool) -> None:
    survey = survey_images(write_band_folders(tmp_path / "images", 12))
    write_recipe(tmp_path / "mine.yaml", survey, choose_settings(survey, Wishes(method=method), has_gpu))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.dataset.channels, recipe.dataset.bits) == (13, 16)
    assert recipe.network_spec["channels"] == 13
    check_recipe(recipe.model_copy(update={"scale": recipe.scale.model_copy(update={"workers": 0})}))
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    assert any(line.startswith("# images: ") and "13 channels of 16 bits" in line for line in lines)
