"""A network that is trained with labels: its filters are drawn beside the pretrained ones, and others start from it."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from firstlight.pipeline import api
from firstlight.pipeline.cli.delete import plan_deletion
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.pictures import FILTERS_FILE, load_filters
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import TrackingLocation, parse_location
from firstlight.pipeline.train.checkpoint import Checkpoints
from tests.support import recipes
from tests.support.recipe_runs import QUIET, runs_of

pytestmark = pytest.mark.usefixtures("undrawn_figures")

TASK = {"name": "classify", "hidden": [12], "dropout": 0.5}


def labelled_recipe(storage: Path, **changes: Any) -> Recipe:
    """A pretraining, and a network of the same kind trained with labels from scratch, which is registered."""
    raw = recipes.recipe(storage, encoder__input="sobel").dump()
    supervised = {
        **raw["stages"]["finetune"],
        "arms": ["scratch"],
        "register_as": "small-labels",
        "task": TASK,
        **changes,
    }
    return parse_recipe({**raw, "stages": {"supervised": supervised, "pretrain": raw["stages"]["pretrain"]}})


def folder_of(recipe: Recipe, stage: str) -> Path:
    (folder,) = (recipe.storage / recipe.name).glob(f"{stage}-seed0-*")
    return folder


def figures_of(recipe: Recipe, name: str) -> set[str]:
    client = mlflow.MlflowClient(TrackingLocation.of(recipe).uri)
    return {Path(a.path).name for a in client.list_artifacts(runs_of(recipe)[name].info.run_id, "figures")}


@pytest.fixture(scope="module")
def ran(undrawn_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = labelled_recipe(tmp_path_factory.mktemp("runs"))
    run_recipe(recipe, QUIET)
    return recipe


def test_filters_are_those_after_the_training_beside_those_of_the_pretraining(ran: Recipe) -> None:
    folder = folder_of(ran, "supervised")
    (towers,) = load_filters(folder / FILTERS_FILE).values()
    trained = load_encoder(folder / "model", 8)
    assert torch.equal(towers[0], trained.compose_first_filters()[0])
    assert towers[0].shape[1] == 1, "combined with the gradients: they act on the gray image"
    for run in ("supervised seed 0", "pretrain seed 0", "small"):
        assert "filters.png" in figures_of(ran, run), run
    report = (ran.storage / ran.name / "report.html").read_text("utf-8")
    assert "filters of the first convolution of all stages" in report


def test_registered_encoder_is_the_trained_one_of_the_chosen_learning_rate(ran: Recipe) -> None:
    folder = folder_of(ran, "supervised")
    client = mlflow.MlflowClient(TrackingLocation.of(ran).uri)
    assert (
        client.get_model_version_by_alias("small-labels", "current").run_id
        == runs_of(ran)["supervised seed 0"].info.run_id
    )
    runs = {path.name: path for path in folder.iterdir() if path.name.startswith("scratch-lr")}
    assert len(runs) == 2
    chosen = f"scratch-lr{runs_of(ran)['supervised seed 0'].data.metrics['scratch/lr']:g}"
    saved = load_encoder(folder / "model", 8).state_dict()
    equal = []
    for name, path in runs.items():
        found, _ = Checkpoints(path / "checkpoints").read_newest()
        assert found is not None
        model = {key.removeprefix("encoder."): value for key, value in found.shared["model"].items()}
        equal += [name] * all(torch.equal(model[key], value) for key, value in saved.items())
    assert equal == [chosen]


def test_another_recipe_starts_from_it(ran: Recipe) -> None:
    raw = recipes.recipe(ran.storage, encoder__input="sobel", name="transfer").dump()
    stage = {**raw["stages"]["finetune"], "encoder": "models:/small-labels@current", "learning_rates": []}
    recipe = parse_recipe({**raw, "stages": {"finetune": stage}})
    run_recipe(recipe, QUIET)
    tags = runs_of(recipe)["finetune seed 0"].data.tags
    assert tags["firstlight.encoder"] == "models:/small-labels/1"
    assert list(load_filters(folder_of(recipe, "finetune") / FILTERS_FILE)) == ["pretrained", "scratch"]


def test_deletion_of_the_recipe_includes_its_encoders(ran: Recipe) -> None:
    lineage, client = read_lineage(parse_location([f"storage={ran.storage}"]))
    plan = plan_deletion(lineage, client, lineage.runs[runs_of(ran)["small"].info.run_id])
    assert len(plan.models) == 2, "that of the pretraining and that of the training with labels"


def test_frozen_filters_are_not_drawn_again(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, stages__finetune__task={"name": "classify", "train": "head"}, **recipes.QUICK)
    run_recipe(recipe, QUIET)
    assert not (folder_of(recipe, "finetune") / FILTERS_FILE).exists()
    assert "filters.png" not in figures_of(recipe, "finetune seed 0")
    assert "filters.png" not in figures_of(recipe, "small"), "one stage alone has some"


@pytest.fixture(scope="module")
def folded(undrawn_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A registered model without batch normalisations."""
    recipe = labelled_recipe(tmp_path_factory.mktemp("folded"), batch_norm="fold", learning_rates=[])
    raw = {**recipe.dump(), "encoder": {**recipe.encoder.model_dump(mode="json"), "norm": "batch"}}
    raw["stages"].pop("pretrain")
    recipe = parse_recipe(raw)
    run_recipe(recipe, QUIET)
    return recipe


def test_model_that_has_lost_layers_is_registered_and_read(folded: Recipe) -> None:
    model = api.load_model("models:/small-labels@current", storage=folded.storage)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.network.encoder.modules())


def test_no_stage_starts_from_an_encoder_that_has_lost_layers(folded: Recipe) -> None:
    raw = folded.dump()
    stage = {"kind": "evaluate", "encoder": "models:/small-labels@current"}
    recipe = parse_recipe({**raw, "name": "transfer", "stages": {"evaluate": stage}})
    with pytest.raises(UserError, match=r"^stages.evaluate.encoder: 'models:/small-labels@current': .* lost layers"):
        run_recipe(recipe, QUIET)
