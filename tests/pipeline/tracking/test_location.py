"""Locations of runs, from recipes and from the command line."""

import json
import string
from pathlib import Path

import pytest
from sqlalchemy import make_url

from firstlight.pipeline.data.mirror.places import CACHE_VARIABLE
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.location import parse_location


def test_location_comes_from_recipe_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_location([]).uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"name": "x", "storage": "there", "tracking": {"uri": "http://host:5000"}, "stages": {}})
    )
    assert parse_location([str(recipe)]) == parse_location(["storage=there", "tracking.uri=http://host:5000"])
    assert parse_location([str(recipe), "storage=here"]).storage == tmp_path / "here"
    for word in (["storag=x"], ["storage=3"], ["a.yaml", "b.yaml"]):
        with pytest.raises(UserError):
            parse_location(word)


@pytest.mark.parametrize(
    "name", ["a b", "50%", "50%20", "a?b=c", "a#b", "ünï", "a+b", "a;b", "a&b", "a@b:c", "it's", "a #b", "- a"]
)
def test_uri_of_a_storage_leads_to_its_database(tmp_path: Path, name: str) -> None:
    location = parse_location([f"storage={json.dumps(str(tmp_path / name))}"])
    assert location.database == tmp_path / name / "mlflow.db"
    assert set(location.uri) <= set(string.ascii_letters + string.digits + "/:+._-%")
    assert parse_location(location.as_overrides) == location
    assert make_url(location.uri).database == str(tmp_path / name / "mlflow.db"), "as MLflow reads it"


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///runs/a.db", "runs/a.db"),
        ("sqlite:////runs/a%20b.db?timeout=3", "/runs/a b.db"),
        ("sqlite+pysqlite:////a.db", "/a.db"),
        ("http://host/sqlite:///a", None),
        ("postgresql://host/a", None),
    ],
)
def test_database_is_the_file_of_an_sqlite_uri(uri: str, file: str | None) -> None:
    assert parse_location([f"tracking.uri={uri}"]).database == (None if file is None else Path(file))


def test_bucket_needs_a_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"^storage: 's3://bucket/runs' needs tracking\.uri: .*; valid: tracking\.uri="):
        parse_location(["storage=s3://bucket/runs"])
    with pytest.raises(UserError, match=r"^storage: 'ftp://c/x' cannot be written; valid: a folder, "):
        parse_location(["storage=ftp://c/x"])
    location = parse_location(["storage=s3://bucket/runs", "tracking.uri=http://host:5000"])
    assert location.storage.parent == tmp_path
    assert location.as_overrides == ("storage=s3://bucket/runs", "tracking.uri=http://host:5000")
    assert parse_location(location.as_overrides) == location


def test_artifacts_of_a_database_stay_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder of a bucket is no place for what is not in the bucket."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    database = f"tracking.uri=sqlite:///{tmp_path}/kept/mlflow.db"
    assert parse_location(["storage=s3://bucket/runs", database]).artifacts == f"{tmp_path}/kept/mlartifacts"
    assert parse_location([f"storage={tmp_path}/runs", database]).artifacts == f"{tmp_path}/runs/mlartifacts"
