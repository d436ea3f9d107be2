"""Evaluation, retrieval and embeddings share one pass over the images; results are to the last bit as without it."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run import runner
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.embed import EmbedStage
from firstlight.pipeline.stages.evaluate import EvaluateStage
from firstlight.pipeline.stages.features import kept_features
from firstlight.pipeline.stages.features.kept_features import KEPT_FOLDER
from firstlight.pipeline.stages.retrieve import RetrieveStage
from firstlight.pipeline.train.held.views import held_views
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from tests.support import recipes
from tests.support.recipe_runs import QUIET

pytestmark = pytest.mark.usefixtures("undrawn_figures")

STAGES = {
    "stages__evaluate": {
        **{"kind": "evaluate", "knn_k": 5, "batch_size": 32, "layers": [0, -1]},
        "probe_weight_decays": [0.001],
    },
    "stages__retrieve": {"kind": "retrieve", "batch_size": 32, "precision_at": [1, 5]},
    "stages__embed": {"kind": "embed", "batch_size": 32, "rows_per_file": 64},
}
ARMS = ("pretrained", "given", "random")


def make_recipe(storage: Path, **changes: Any) -> Recipe:
    """A recipe whose stages take the same features of pretrained, given and random weights."""
    storage.mkdir(exist_ok=True)
    file = storage.parent / "weights.safetensors"
    colours = {"encoder__mean": [0.1, 0.1, 0.1], "encoder__std": [0.3, 0.3, 0.3]}
    recipe = recipes.recipe(storage, encoder__weights=str(file), **{**colours, **deepcopy(STAGES), **changes})
    del recipe.stages["finetune"]
    if not file.exists():
        torch.manual_seed(7)
        save_file(Encoder(recipe.network_spec, 8).state_dict(), file)
    return recipe


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The images that networks pass over, and those that are decoded, by stage."""
    found: Counter[str] = Counter()
    stages = ["other"]

    def name_stage(run: Callable[..., None], name: str) -> Callable[..., None]:
        def run_named(*arguments: Any) -> None:
            stages.append(name)
            # Views that are held in this process would hide what a stage decodes.
            held_views.clear()
            run(*arguments)
            stages.pop()

        return run_named

    for kind, name in ((EvaluateStage, "evaluate"), (RetrieveStage, "retrieve"), (EmbedStage, "embed")):
        monkeypatch.setattr(kind, "run", name_stage(kind.run, name))
    forward, open_image = FeatureExtractor.forward, Store.open_image

    def forward_counted(network: FeatureExtractor, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found[f"{stages[-1]} network"] += len(images)
        return forward(network, images)

    def open_counted(*arguments: Any) -> Any:
        found[f"{stages[-1]} decoded"] += 1
        return open_image(*arguments)

    monkeypatch.setattr(FeatureExtractor, "forward", forward_counted)
    monkeypatch.setattr(Store, "open_image", open_counted)
    return found


def count_images(recipe: Recipe) -> dict[str, int]:
    """The images of each split, as the embeddings say."""
    (folder,) = (recipe.storage / recipe.name).glob("embed-seed0-*")
    return dict(json.loads((folder / "result.json").read_text())["counts"])


def read_results(recipe: Recipe) -> dict[str, bytes]:
    """Everything that the three stages have made, by its file without the hash of its folder."""
    found = {}
    for stage in ("evaluate", "retrieve", "embed"):
        for folder in (recipe.storage / recipe.name).glob(f"{stage}-seed*"):
            label = folder.name.rpartition("-")[0]
            for file in (folder / "result.json", *folder.glob("*.safetensors"), *folder.glob("*/*")):
                if file.parent.name in (folder.name, "index", "embeddings"):
                    found[f"{label}/{file.relative_to(folder)}"] = file.read_bytes()
    return found


def test_embeddings_on_several_threads_are_those_that_were_kept(tmp_path: Path, counted: Counter[str]) -> None:
    """Threads decide the last bits, so that features of other numbers of threads are not taken."""
    threads = {"scale__threads": "auto", "scale__cpus": 2}
    run_recipe(make_recipe(tmp_path / "shared", seeds=[0], **threads), QUIET)
    assert counted["evaluate network"] > 0
    assert counted["embed network"] == 0


def test_features_of_another_number_format_are_not_taken(tmp_path: Path, counted: Counter[str]) -> None:
    recipe = make_recipe(tmp_path / "mixed", seeds=[0], stages__embed__precision="bf16")
    run_recipe(recipe, QUIET)
    assert counted["retrieve network"] == 0
    assert counted["embed network"] == sum(count_images(recipe).values())


def test_later_stages_neither_decode_nor_compute_and_all_bits_are_the_same(
    tmp_path: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = make_recipe(tmp_path / "shared")
    run_recipe(shared, QUIET)
    assert not (shared.storage / shared.name / KEPT_FOLDER).exists(), "it lasts as long as a run"
    with_sharing = dict(counted)
    counted.clear()
    monkeypatch.setattr(kept_features, "MAX_KEPT_BYTES", 0)
    alone = make_recipe(tmp_path / "alone")
    run_recipe(alone, QUIET)
    sizes = count_images(shared)
    images, searched = sum(sizes.values()), sizes["train"] + sizes["test"]
    assert {name: count for name, count in with_sharing.items() if "other" not in name} == {
        "evaluate network": 3 * images,
        "evaluate decoded": images,
    }
    assert {name: count for name, count in counted.items() if "other" not in name} == {
        "evaluate network": 3 * images,
        "evaluate decoded": images,
        "retrieve network": 3 * searched,
        "retrieve decoded": searched,
        "embed network": images,
        "embed decoded": images,
    }
    first, second = read_results(shared), read_results(alone)
    assert {"evaluate-seed0/map.safetensors", "retrieve-seed0/index/index.faiss"} <= first.keys()
    assert {f"embed-seed0/embeddings/{split}-00000.parquet" for split in ("train", "val", "test")} <= first.keys()
    assert first.keys() == second.keys()
    for name, content in first.items():
        assert content == second[name], name


def test_given_weights_are_passed_once_for_all_seeds(tmp_path: Path, counted: Counter[str]) -> None:
    stages = ("retrieve", "embed")
    recipe = make_recipe(tmp_path / "seeds", seeds=[0, 1], stages__retrieve__arms=["given", "random"])
    recipe = recipe.model_copy(update={"stages": {name: recipe.stages[name] for name in stages}})
    assert recipe.stages["embed"].encoder == "previous"
    run_recipe(recipe, QUIET)
    sizes = count_images(recipe)
    searched = sizes["train"] + sizes["test"]
    assert counted["retrieve network"] == searched * (1 + 2), "random weights are drawn for each seed"
    assert counted["embed network"] == 2 * sizes["val"], "held-out images are neither searched nor asked for"


def test_an_embedding_whose_batches_differ_is_computed(tmp_path: Path, counted: Counter[str]) -> None:
    """Files of 40 images begin other batches than those of 32."""
    recipe = make_recipe(tmp_path / "files", stages__embed__rows_per_file=40)
    run_recipe(recipe, QUIET)
    sizes = count_images(recipe)
    assert sizes["val"] < 40 < sizes["test"]
    assert counted["embed network"] == sizes["train"] + sizes["test"], "the held-out images fit into one file"


def test_a_killed_run_leaves_nothing_for_the_next_one(
    tmp_path: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    recipe = make_recipe(tmp_path / "killed")
    with monkeypatch.context() as patched:
        patched.setattr(RetrieveStage, "run", die)
        patched.setattr(runner, "keep_features_for", lambda folder: contextlib.nullcontext())
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, QUIET)
    files = list((recipe.storage / recipe.name / KEPT_FOLDER).iterdir())
    assert files
    counted.clear()
    run_recipe(recipe, QUIET)
    sizes = count_images(recipe)
    assert counted["evaluate network"] == 0, "it had finished"
    assert counted["retrieve network"] == 3 * (sizes["train"] + sizes["test"])
    assert not files[0].parent.exists()
