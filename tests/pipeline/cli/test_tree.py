"""The view of one run: its ancestors, its descendants and its inputs."""

import time
from pathlib import Path

from firstlight.pipeline.cli.tree import build_run_view
from firstlight.pipeline.tracking.lineage import Lineage, read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support.mlflow_runs import STORE, Past, chain
from tests.support.rendering import render_text


def render_run(lineage: Lineage, run: str) -> str:
    return render_text(build_run_view(lineage, lineage.find_run(run), time.time()))


def test_tree_of_a_recipe_goes_from_the_store_to_the_stages_of_other_recipes(lineage: Lineage) -> None:
    lines = render_run(lineage, "first").splitlines()
    names = [line.strip("│├└─ ").split("  ")[0] for line in lines[2:]]
    assert names == [
        "digits-abc",
        f"sha256 {STORE[:12]}",
        "pretrain seed 0",
        "models:/digits-nat/1",
        "evaluate seed 0",
        "evaluate seed 0",
        "pretrain seed 1",
        "evaluate seed 1",
    ]
    assert "in second" in lines[7]
    assert "1,438" in lines[2]


def test_stage_is_shown_with_its_ancestors_and_inputs(lineage: Lineage, run_ids: dict[str, str]) -> None:
    text = render_run(lineage, run_ids["other"])
    assert "pretrain seed 0" in text
    assert "pretrain seed 1" not in text
    assert f"encoder models:/digits-nat/1, made by pretrain seed 0 ({run_ids['pretrain0'][:8]})" in text
    assert f"sha256 {STORE}" in text


def test_prepare_run_is_shown_with_all_stages_that_read_its_store(lineage: Lineage, run_ids: dict[str, str]) -> None:
    text = render_run(lineage, run_ids["prepare"])
    assert text.count("evaluate seed 0") == 2
    assert "images digits" in text


def test_encoder_whose_run_was_deleted_is_named(tmp_path: Path) -> None:
    past, run_ids = chain(tmp_path)
    past.client.delete_run(run_ids["pretrain0"])
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    text = render_run(lineage, run_ids["other"])
    assert "from models:/digits-nat/1, whose run does not exist any more" in text


def test_search_is_shown_with_all_of_its_trials(tmp_path: Path) -> None:
    past = Past(tmp_path)
    search = past.recipe("temperature", kind="search")
    for number in range(12):
        trial = past.recipe(f"trial-{number}", search, kind="trial")
    pretrained = past.pretrain("trial-11", trial)
    past.evaluate("trial-11", trial, f"runs:/{pretrained}/encoder")
    lineage, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    text = render_run(lineage, "temperature")
    assert "kNN 95.0 % (random 90.0)" in text
    assert all(f"trial-{number}" in text for number in range(12))
