"""A kind of stage that is one file: registered here, it runs through a whole recipe, the table, MLflow, the report and
the commands.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from firstlight.pipeline.cli.main import cli
from firstlight.pipeline.config.comparison import FeatureStage
from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.stages import STAGE_SECTIONS
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_json
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search.objectives import check_measure, read_scores
from firstlight.pipeline.stages.features.frozen_features import build_extractors, compute_features
from firstlight.pipeline.stages.registry import STAGES, register_stage
from firstlight.pipeline.stages.sections.feature_measures import compare_features
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from firstlight.pipeline.stages.stage_kind import StageKind
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.tracking.run_file import read_run_id
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.collective import barrier, rank
from tests.support import recipes

pytestmark = pytest.mark.usefixtures("undrawn_figures")


class ClassMeans(FeatureStage):
    """Classifies images by the nearest mean of a class."""

    kind: Literal["class_means"]

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return (-1,)

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (compare_features(self, "nearest_mean", "nearest class mean"),)


class ClassMeansStage(StageKind[ClassMeans]):
    """Accuracy of the nearest class mean, pretrained and with random weights."""

    section = ClassMeans

    def run(self, context: StageContext, stage: ClassMeans, instance: StageInstance) -> None:
        splits = context.splits
        ids = np.concatenate((splits.train, splits.val, splits.test))
        networks = build_extractors(context, stage, instance)
        features = compute_features(context, networks, ids, instance, stage.batch_size)
        if rank() == 0:
            sizes = [len(splits.train), len(splits.val), len(splits.test)]
            labels = torch.from_numpy(splits.labels[ids]).split(sizes)
            result = {}
            for arm, (layer,) in features.items():
                train, *scored = layer.split(sizes)
                means = torch.stack([train[labels[0] == c].mean(0) for c in range(len(context.store.classes))])
                right = [torch.cdist(x, means).argmin(1) == y for x, y in zip(scored, labels[1:], strict=True)]
                val, test = (float(hit.double().mean()) for hit in right)
                result[arm] = {"nearest_mean": {"val": val, "test": test}}
            write_json(instance.folder / RESULT_FILE, result)
        barrier()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kind of stage is known as long as a test runs."""
    with monkeypatch.context() as patched:
        patched.setitem(STAGES, "class_means", None)
        patched.setitem(STAGE_SECTIONS, "class_means", ClassMeans)
        register_stage(ClassMeansStage())
        yield


def stages_of(name: str) -> dict[str, object]:
    pretrain = recipes.RECIPE["stages"]["pretrain"]
    return {"pretrain": pretrain, name: {"kind": "class_means", "batch_size": 32}}


def list_runs(storage: Path) -> list[Run]:
    from firstlight.pipeline.tracking.lineage import read_lineage
    from firstlight.pipeline.tracking.location import parse_location

    return list(read_lineage(parse_location([f"storage={storage}"]))[0].runs.values())


def test_registered_kind_runs_through_prepare_table_mlflow_report_and_commands(
    tmp_path: Path, registered: None
) -> None:
    expected = [{"stage": "means", "measure": "nearest_mean", "paper": 61.5, "source": "nowhere"}]
    recipe = recipes.recipe(tmp_path, seeds=[0, 1], stages=stages_of("means"), expected=expected)
    (row,) = run_recipe(recipe, Console(quiet=True)).rows
    assert (row.stage, row.measure, row.against) == ("means", "nearest class mean", "random weights")
    assert len(row.pretrained) == len(row.baseline) == 2
    assert all(0.0 < value < 1.0 for value in (*row.pretrained, *row.baseline))

    folder = tmp_path / recipe.name
    instances = sorted(folder.glob("means-seed*"))
    assert len(instances) == 2
    runs = {run.id: run for run in list_runs(tmp_path)}
    logged = [runs[str(read_run_id(instance))].metrics["pretrained/nearest_mean_test"] for instance in instances]
    assert logged == list(row.pretrained)

    page = (folder / "report.html").read_text("utf-8")
    assert "nearest class mean" in page
    assert "61.5" in page

    listed = CliRunner().invoke(cli, ["runs", f"storage={tmp_path}"])
    assert listed.exit_code == 0, listed.output
    assert "means" in listed.output
    shown = CliRunner().invoke(cli, ["show", recipe.name, f"storage={tmp_path}"])
    assert shown.exit_code == 0, shown.output
    assert "means" in shown.output
    for value, baseline in zip(row.pretrained, row.baseline, strict=True):
        assert f"nearest_mean {100 * value:.1f} % (random {100 * baseline:.1f})" in " ".join(shown.output.split())

    assert run_recipe(recipe, Console(quiet=True)).rows == [row], "a finished instance is not run again"


def test_search_judges_trials_by_a_registered_kind(tmp_path: Path, registered: None) -> None:
    recipe = recipes.recipe(tmp_path, stages=stages_of("means"))
    check_measure("means.nearest_mean", "objectives.0.measure", recipe)
    with pytest.raises(UserError, match=r"objectives\.0\.measure: 'means\.knn' is not measured; .*means\.nearest_mean"):
        check_measure("means.knn", "objectives.0.measure", recipe)
    folder = tmp_path / "means"
    folder.mkdir()
    write_json(folder / RESULT_FILE, {"pretrained": {"nearest_mean": {"val": 0.25, "test": 0.5}}})
    instance = StageInstance("means", 0, "0", folder)
    assert read_scores("means.nearest_mean", recipe, [instance]) == [0.25]


def test_unregistered_kind_is_refused_with_the_known_kinds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.means\.kind: 'class_means' is unknown; .*pretrain"):
        recipes.recipe(tmp_path, stages=stages_of("means"))
