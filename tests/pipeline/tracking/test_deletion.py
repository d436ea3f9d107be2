"""Deleted runs leave no rows and no artifacts."""

import json
from pathlib import Path

import pytest

from firstlight.pipeline.tracking.deletion import delete_records, find_logged_models
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support.mlflow_runs import chain


@pytest.mark.parametrize("name", ["plain", "a b", "100%", "a%20b", "#1 ?x ü"])
def test_run_is_deleted_with_its_model_version_and_artifacts(tmp_path: Path, name: str) -> None:
    _, runs = chain(tmp_path / name)
    location = parse_location([f"storage={json.dumps(str(tmp_path / name))}"])
    lineage, client = read_lineage(location)
    run = lineage.runs[runs["pretrain0"]]
    models = find_logged_models(lineage, client, run)
    assert models == [run.model]
    delete_records(lineage, client, [run], lineage.list_models(run), models)
    left, client = read_lineage(location)
    assert left.runs.keys() == lineage.runs.keys() - {run.id}
    assert left.versions == ()
    assert client.search_registered_models() == []
    assert client.search_logged_models([lineage.experiment_id], f"source_run_id = '{run.id}'") == []
    folders = (tmp_path / name / "mlartifacts").rglob("*")
    assert not [folder for folder in folders if {run.id, *models} & set(folder.parts) and folder.is_file()]
    assert [folder for folder in (tmp_path / name / "mlartifacts").rglob("*") if runs["pretrain1"] in folder.parts]
    assert find_logged_models(left, client, left.runs[runs["pretrain1"]]), "of another run"
