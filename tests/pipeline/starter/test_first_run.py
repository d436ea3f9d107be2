"""The recipe of a run that is asked for in one line: what it holds, when it is kept, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.preflight import check_recipe
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.embed import EMBEDDINGS_FOLDER, open_embeddings
from firstlight.pipeline.starter import first_run
from firstlight.pipeline.starter.choices import Wishes
from firstlight.pipeline.starter.first_run import FirstRun, write_first_run
from firstlight.pipeline.terminal import SafeConsole
from tests.support.channel_images import write_band_folders
from tests.support.finetunings import save_seen_encoder
from tests.support.folders_of_noise import write_noise_folder

WEIGHTS = {"model": "test_resnet", "weights": "timm"}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    write_noise_folder(tmp_path / "images", {"a": 12, "b": 12}, (40, 36))
    return tmp_path / "images"


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    (tmp_path / "plain").mkdir()
    write_noise_folder(tmp_path / "plain", {".": 24}, (40, 36))
    return tmp_path / "plain"


@pytest.fixture(autouse=True)
def weights_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds weights wherever they are said to be; none are loaded."""
    monkeypatch.setattr(first_run, "find_weights", lambda source, spec: None)


def write(data: Path, goal: str, **wishes: object) -> tuple[Path, list[str]]:
    told = list[str]()
    asked = FirstRun(data, data.parent / "out", Wishes(goal=goal, **wishes))  # type: ignore[arg-type]
    return write_first_run(asked, told.append), told


@pytest.mark.parametrize(
    ("goal", "stages"),
    [
        ("pretrain", ["pretrain", "evaluate"]),
        ("evaluate", ["pretrain", "evaluate"]),
        ("finetune", ["pretrain", "finetune"]),
        ("retrieve", ["pretrain", "retrieve"]),
        ("embed", ["pretrain", "embed"]),
        ("export", ["pretrain", "export"]),
    ],
)
def test_goal_is_reached_from_a_pretraining_or_from_weights(labelled: Path, goal: str, stages: list[str]) -> None:
    file, told = write(labelled, goal, epochs=1)
    recipe = load_recipe(file)
    assert list(recipe.stages) == stages
    assert recipe.storage == recipe.storage.resolve() == labelled.parent / "out"
    assert recipe.name == "out"
    check_recipe(recipe)
    assert len(told) == 6
    assert told[-1] == f"recipe: {file}"
    file.unlink()
    file, told = write(labelled, goal, **WEIGHTS)
    recipe = load_recipe(file)
    assert list(recipe.stages) == (stages if goal == "pretrain" else [goal])
    assert recipe.takes_given
    check_recipe(recipe)


def test_pretraining_without_labels_embeds(unlabelled: Path) -> None:
    assert list(load_recipe(write(unlabelled, "pretrain")[0]).stages) == ["pretrain", "embed"]


@pytest.mark.parametrize("goal", ["evaluate", "finetune"])
def test_goals_with_labels_are_refused_without(unlabelled: Path, goal: str) -> None:
    with pytest.raises(UserError, match=rf"^--data: {goal} needs labels, and its images have none; valid: a folder"):
        write(unlabelled, goal)
    assert not (unlabelled.parent / "out").exists()


def test_recipe_of_the_same_request_is_kept_and_another_refused(labelled: Path) -> None:
    file, _ = write(labelled, "pretrain", epochs=1)
    file.write_text(file.read_text() + "# my note\n")
    _, told = write(labelled, "pretrain", epochs=1)
    assert told == [f"recipe: {file}, as before"]
    assert file.read_text().endswith("# my note\n")
    for goal, wishes in (("pretrain", {"epochs": 2}), ("embed", {"epochs": 1})):
        with pytest.raises(UserError, match=r"^--out: .*out has a recipe of something else, .*; valid: another folder"):
            write(labelled, goal, **wishes)


@pytest.mark.parametrize("key", ["method", "epochs", "minutes"])
def test_length_and_method_are_refused_where_nothing_is_pretrained(labelled: Path, key: str) -> None:
    asked = FirstRun(labelled, labelled.parent / "out", Wishes(goal="embed", **WEIGHTS))
    value = {"method": "simclr", "epochs": 3, "minutes": 2.0}[key]
    asked = replace(asked, minutes=2.0) if key == "minutes" else asked
    if key != "minutes":
        asked = replace(asked, wishes=replace(asked.wishes, **{key: value}))
    with pytest.raises(UserError, match=rf"^--{key}: is not valid: embed with --weights pretrains nothing; valid: "):
        write_first_run(asked, print)


def test_minutes_become_epochs_by_the_measured_rate(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run, "measure_pretraining_rate", lambda file, images: 2.0)
    told = list[str]()
    asked = FirstRun(labelled, labelled.parent / "out", Wishes(goal="pretrain", method="simclr"), minutes=5.0)
    stage = load_recipe(write_first_run(asked, told.append)).stages["pretrain"]
    # 20 images of three seeds at 2 images/s take 30 s.
    assert told[0].startswith("images: 20 training")
    assert stage.epochs == 10  # type: ignore[attr-defined]
    assert told[4] == "length: 10 epochs with batches of 4, 3 seeds: about 5.0 minutes at 2 images/s"
    assert sorted(file.name for file in asked.out.iterdir()) == ["recipe.yaml"]
    asked = replace(asked, out=labelled.parent / "short", minutes=0.1)
    assert load_recipe(write_first_run(asked, told.append)).stages["pretrain"].epochs == 1  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^--minutes: cannot be combined with --epochs; valid: one of them$"):
        write_first_run(replace(asked, wishes=Wishes(goal="pretrain", epochs=3)), print)


def test_weights_that_cannot_be_had_end_it_before_anything_is_measured(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, spec: object) -> None:
        raise ValueError(f"{source!r} cannot be downloaded")

    def measure(*_: object) -> float:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(first_run, "find_weights", refuse)
    monkeypatch.setattr(first_run, "measure_pretraining_rate", measure)
    asked = FirstRun(labelled, labelled.parent / "out", Wishes(goal="pretrain", **WEIGHTS), minutes=1)
    with pytest.raises(UserError, match=r"^--weights: 'timm' cannot be downloaded$"):
        write_first_run(asked, lambda line: None)
    assert not (labelled.parent / "out").exists()


def test_weights_for_colours_end_in_a_line_before_a_run_on_bands(tmp_path: Path) -> None:
    _, encoder = save_seen_encoder(
        tmp_path / "trained",
        {"name": "convnet", "norm": "batch", "width": 4, "depth": 2, "mean": [0.5] * 3, "std": [0.25] * 3},
    )
    file, told = write(write_band_folders(tmp_path / "bands", 6), "embed", weights=str(encoder))
    assert "must be stated unless it brings them" in told[2]
    needed = r"^encoder\.mean: is needed, since encoder\.weights does not say .*; valid: 13 numbers, one for each"
    with pytest.raises(UserError, match=needed):
        run_recipe(load_recipe(file), SafeConsole(quiet=True))
    stated = (f"encoder.mean={[0.4] * 13}", f"encoder.std={[0.1] * 13}")
    (instance,) = run_recipe(load_recipe(file, stated), SafeConsole(quiet=True)).instances
    assert open_embeddings(instance.folder / EMBEDDINGS_FOLDER)[0].shape == (12,)
