"""Every key of a finished run in MLflow follows docs/mlflow.md, and its recipe's run shows data set and models."""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.run_file import read_run_file
from tests.support import recipes
from tests.support.paths import ROOT
from tests.support.recipe_runs import QUIET

pytestmark = pytest.mark.usefixtures("undrawn_figures")

PAGE = ROOT / "docs" / "mlflow.md"
# Placeholders that do not depend on the recipe.
WORDS = {
    "seed": r"\d+",
    "split": "(train|val|test)",
    "rate": r"[\d.e+-]+",
    "number": r"[a-z][a-z0-9_]*",
    "class": r"[^/]+",
    "key": r"[a-z0-9_]+(\.[a-z0-9_]+)*",
    "format": "(safetensors|onnx|torch_export|torchvision|timm)",
}
EVERY_STAGE, STAGE_RUN = "every stage", "a stage and seed"


@pytest.fixture(scope="module")
def finished(undrawn_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    storage = tmp_path_factory.mktemp("runs")
    recipe = recipes.recipe(
        storage,
        seeds=[0, 1, 2],
        stages__pretrain__epochs=1,
        stages__pretrain__register_as="keys",
        stages__retrieve={"kind": "retrieve"},
        stages__embed={"kind": "embed"},
        **recipes.ONE_PROBE,
    )
    run_recipe(recipe, QUIET)
    return recipe


def read_documented_keys(heading: str) -> dict[str, list[str]]:
    """Returns the code spans of the table under a heading `| run | <heading> |`, by the text of its first column."""
    lines = PAGE.read_text().splitlines()
    start = lines.index(f"| run | {heading} |") + 2
    rows = [line.strip("| ").split(" | ", 1) for line in lines[start:] if line.startswith("| ") or not line]
    rows = rows[: rows.index([""])] if [""] in rows else rows
    return {first.strip("`"): re.findall(r"`([^`]+)`", rest) for first, rest in rows}


def make_pattern(span: str, recipe: Recipe) -> re.Pattern[str]:
    measures = [measure for stage in recipe.stages.values() for measure in stage.measures]
    words = {
        **WORDS,
        "stage": f"({'|'.join(recipe.stages)})",
        "arm": f"({'|'.join(sorted({arm for measure in measures for arm in measure.arms}))})",
        "measure": f"({'|'.join(sorted({measure.name.replace('@', '_at_') for measure in measures}))})",
    }
    parts = re.split(r"<(\w+)>", span)
    return re.compile("".join(words[part] if k % 2 else re.escape(part) for k, part in enumerate(parts)))


def list_runs(recipe: Recipe) -> list[tuple[str, Any]]:
    """Returns the kind and the data of each run."""
    tracking = TrackingClient(recipe)
    found = tracking.client.search_runs([tracking.experiment_id])
    return [(run.data.tags.get("firstlight.kind", "recipe"), run) for run in found]


def test_every_metric_follows_the_page(finished: Recipe) -> None:
    documented = read_documented_keys("metrics")
    seen = set[str]()
    for kind, run in list_runs(finished):
        spans = documented[kind] + (documented[EVERY_STAGE] if kind not in ("recipe", "prepare") else [])
        # The recipe's gains are written in short.
        spans += [f"<stage>/<measure>/<arm>/{span}" for span in spans if span.startswith("gain_")]
        patterns = [make_pattern(span, finished) for span in spans]
        wrong = [key for key in run.data.metrics if not any(pattern.fullmatch(key) for pattern in patterns)]
        assert not wrong, (kind, wrong)
        assert run.data.metrics
        seen.add(kind)
    assert seen == {"recipe", "prepare", *finished.stages}


def test_every_parameter_and_tag_follows_the_page(finished: Recipe) -> None:
    documented = read_documented_keys("parameters")
    for kind, run in list_runs(finished):
        spans = documented.get(kind) or documented[STAGE_RUN]
        patterns = [make_pattern(span, finished) for span in spans]
        assert not [key for key in run.data.params if not any(pattern.fullmatch(key) for pattern in patterns)]
        assert not [tag for tag in run.data.tags if not re.fullmatch(r"(firstlight|mlflow)\.[\w.-]+", tag)]


def test_scores_are_called_as_in_the_recipe(finished: Recipe) -> None:
    (metrics,) = (run.data.metrics for kind, run in list_runs(finished) if kind == "recipe")
    stage_runs = {run.data.tags["mlflow.runName"]: run.data.metrics for _, run in list_runs(finished)}
    for seed in finished.seeds:
        scored = stage_runs[f"evaluate seed {seed}"]
        for arm in ("pretrained", "random"):
            assert metrics[f"evaluate/knn/{arm}/seed{seed}"] == scored[f"{arm}/knn_test"]
        assert metrics[f"finetune/accuracy/scratch/seed{seed}"] == stage_runs[f"finetune seed {seed}"]["scratch/test"]
    gains = [metrics[f"evaluate/knn/pretrained/{name}_percent"] for name in ("gain_low", "mean_gain", "gain_high")]
    assert gains == sorted(gains)


def test_run_of_the_recipe_shows_data_set_and_models_once(finished: Recipe) -> None:
    def read_parts() -> tuple[list[str], list[str]]:
        (run,) = (run for kind, run in list_runs(finished) if kind == "recipe")
        return (
            [given.dataset.digest for given in run.inputs.dataset_inputs],
            sorted(model.model_id for model in run.outputs.model_outputs),
        )

    made = [
        model.model_id
        for kind, run in list_runs(finished)
        if kind not in ("recipe", "prepare")
        for model in (run.outputs.model_outputs if run.outputs else None) or ()
    ]
    digests, models = read_parts()
    assert len(digests) == 1
    assert models == sorted(made)
    assert len(models) >= len(finished.seeds)
    # Published again, as after a kill before the end.
    (file,) = (Path(finished.storage) / finished.name / "recipes").glob("*.json")
    write_sealed_json(file, {**read_run_file(file), "closed": False})
    run_recipe(finished, Console(quiet=True))
    assert read_parts() == (digests, models)
