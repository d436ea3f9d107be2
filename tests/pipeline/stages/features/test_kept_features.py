"""Kept features are found by all that decides their bits, are whole or absent, and are what would be computed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.features import kept_features
from firstlight.pipeline.stages.features.frozen_features import compute_features
from firstlight.pipeline.stages.features.kept_features import (
    KEPT_FOLDER,
    group_places,
    has_kept,
    hash_features,
    keep_features_for,
    read_kept,
    remove_kept,
    write_kept,
)
from firstlight.pipeline.stages.shared_work import hash_weights
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.collective import rank
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from tests.support import recipes
from tests.support.gloo import Pool

CPU = torch.device("cpu")
KEY = "ab" * 32


def make_recipe(storage: Path, **changes: Any) -> Recipe:
    retrieve = {"kind": "retrieve", "batch_size": 32, "precision_at": [1]}
    return recipes.recipe(storage, stages__retrieve=retrieve, **changes)


def make_network(recipe: Recipe, layers: tuple[int, ...] = (-1,)) -> FeatureExtractor:
    torch.manual_seed(0)
    return FeatureExtractor(Encoder(recipe.network_spec, recipe.dataset.image_size), None, layers, "avg").eval()


def make_context(storage: Path, store: Store, **changes: Any) -> StageContext:
    return StageContext.create(make_recipe(storage, **changes), store, on_ray=False)


def test_images_are_grouped_by_split_and_label_in_the_order_of_ids(tmp_path: Path, digits: Store) -> None:
    splits = make_context(tmp_path, digits).splits
    labels = splits.labels.copy()
    labels[splits.train[::2]] = -1
    splits = replace(splits, labels=labels)
    ids = np.random.default_rng(0).permutation(np.concatenate((splits.train, splits.val, splits.test)))
    groups = [ids[places] for places in group_places(splits, ids)]
    train, val, test = splits.train, splits.val, splits.test
    for found, expected in zip(groups, (train[1::2], train[::2], val, test), strict=True):
        assert found.tolist() == expected.tolist()


def test_groups_with_fewer_images_than_workers_join_the_one_before(tmp_path: Path, digits: Store) -> None:
    splits = make_context(tmp_path, digits).splits
    ids = np.concatenate((splits.train[:1], splits.val[:3], splits.test[:4]))
    assert [len(places) for places in group_places(splits, ids, 1)] == [1, 3, 4]
    assert [len(places) for places in group_places(splits, ids, 2)] == [4, 4]
    assert [ids[places].tolist() for places in group_places(splits, ids, 9)] == [sorted(ids.tolist())]


def add_to_weight(network: FeatureExtractor) -> None:
    with torch.no_grad():
        next(network.parameters()).flatten()[0].add_(1e-6)


Change = Callable[[dict[str, Any], pytest.MonkeyPatch], None]


def change_mean(facts: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    facts["network"].encoder.input.mean.add_(1e-6)


def change_weight(facts: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    add_to_weight(facts["network"])


def change_precision(facts: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")


def change_threads(facts: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 7)


def change_dtype(facts: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    facts["network"] = facts["network"].double()


def change_device(facts: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    facts["device"] = torch.device("cuda")


def change_workers(facts: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kept_features, "world_size", lambda: 2)


@pytest.mark.parametrize(
    "change",
    [
        change_mean,
        change_weight,
        change_precision,
        change_threads,
        change_dtype,
        change_device,
        change_workers,
        lambda facts, patch: facts.update(ids=facts["ids"][:-1]),
        lambda facts, patch: facts.update(batch_size=16),
        lambda facts, patch: setattr(facts["network"], "pool", "grid"),
        lambda facts, patch: setattr(facts["network"], "layers", [0]),
        lambda facts, patch: setattr(facts["network"], "autocast", torch.bfloat16),
        lambda facts, patch: facts.update(network=make_network(make_recipe(Path("x"), encoder__init="he"))),
        lambda facts, patch: facts.update(changes={"dataset__image_size": 10}),
        lambda facts, patch: facts.update(changes={"dataset__max_pixels": 100}),
        lambda facts, patch: facts.update(changes={"dataset__eval_augment": [{"op": "fit"}]}),
    ],
)
def test_hash_changes_with_every_input_that_decides_a_bit(
    tmp_path: Path, digits: Store, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_with(facts: dict[str, Any]) -> list[str]:
        context = make_context(tmp_path, digits, **facts["changes"])
        weights = hash_weights(facts["network"])
        return hash_features(context, facts["network"], weights, facts["ids"], facts["batch_size"], facts["device"])

    ids = make_context(tmp_path, digits).splits.train
    facts: dict[str, Any] = {"ids": ids, "batch_size": 32, "device": CPU, "changes": {}}
    before = hash_with({**facts, "network": make_network(make_recipe(tmp_path))})
    facts["network"] = make_network(make_recipe(tmp_path))
    assert hash_with(facts) == before
    change(facts, monkeypatch)
    (found,) = hash_with(facts)
    assert [found] != before


def test_another_store_changes_the_hash(tmp_path: Path, digits: Store) -> None:
    context = make_context(tmp_path, digits)
    network, ids = make_network(context.recipe), context.splits.train
    other = replace(context, store=replace(digits, hash="0" * 64))
    hashes = [hash_features(one, network, "w", ids, 32, CPU) for one in (context, other)]
    assert hashes[0] != hashes[1]


def test_features_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = torch.randn(5, 3)
    rows[0, 0], rows[1, 1] = float("nan"), -0.0
    assert read_kept(tmp_path, KEY) is None
    assert not has_kept(tmp_path)
    write_kept(tmp_path, KEY, rows.T.contiguous().T)
    assert has_kept(tmp_path)
    found = read_kept(tmp_path, KEY)
    assert found is not None
    assert torch.equal(found.view(torch.int32), rows.view(torch.int32))
    remove_kept(tmp_path, KEY)
    remove_kept(tmp_path, KEY)
    assert read_kept(tmp_path, KEY) is None


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "harm",
    [
        flip_last_bit,
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes().replace(b"[4,3]", b"[3,4]")),
        lambda file: file.write_bytes(file.read_bytes().replace(b"sha256", b"sha257")),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: shutil.move(file.with_name(f"{'cd' * 32}.safetensors"), file),
    ],
)
def test_damaged_and_foreign_files_are_as_none(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    for key in (KEY, "cd" * 32):
        write_kept(tmp_path, key, torch.randn(4, 3))
    assert read_kept(tmp_path, KEY) is not None
    harm(tmp_path / KEPT_FOLDER / f"{KEY}.safetensors")
    assert read_kept(tmp_path, KEY) is None


def test_no_more_is_kept_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_features, "MAX_KEPT_BYTES", 1300)
    for number in range(3):
        write_kept(tmp_path, f"{number}", torch.zeros(50, 3))
    assert [read_kept(tmp_path, f"{number}") is not None for number in range(3)] == [True, False, False]
    assert sum(file.stat().st_size for file in (tmp_path / KEPT_FOLDER).iterdir()) <= 1300


def test_a_disk_that_refuses_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / KEPT_FOLDER).write_text("a file where the folder should be")
    write_kept(tmp_path, KEY, torch.zeros(4, 3))
    assert read_kept(tmp_path, KEY) is None


def test_kept_features_last_as_long_as_a_run(tmp_path: Path) -> None:
    def die() -> None:
        with keep_features_for(tmp_path):
            assert not has_kept(tmp_path)
            write_kept(tmp_path, KEY, torch.zeros(4, 3))
            raise KeyboardInterrupt

    write_kept(tmp_path, KEY, torch.zeros(4, 3))
    with pytest.raises(KeyboardInterrupt):
        die()
    assert not has_kept(tmp_path)


def pass_twice(storage: Path, path: Path, count: int, harm: bool = False) -> dict[str, Any]:
    """Computes features in the name of an evaluation, then in that of the retrieval after it, and without sharing."""
    context = make_context(storage, Store.open(path))
    splits, networks = context.splits, {"random": make_network(context.recipe)}
    ids = np.concatenate((splits.train[:count], splits.val, splits.test))
    seen: list[int] = []
    networks["random"].register_forward_hook(lambda network, images, features: seen.append(len(features[0])))

    def run(stage: str, wanted: np.ndarray, **facts: Any) -> Tensor:
        seen.clear()
        instance = StageInstance(stage, 0, "f", storage / "run" / f"{stage}-seed0-f", **facts)
        ((features,),) = compute_features(context, networks, wanted, instance, 32).values()
        return features

    out: dict[str, Any] = {"evaluated": run("evaluate", ids, facts={"seed": 0}), "first": sum(seen)}
    files = sorted((storage / "run" / KEPT_FOLDER).iterdir())
    if harm and rank() == 0:
        flip_last_bit(files[0])
    searched = np.union1d(splits.train[:count], splits.test)
    out |= {"retrieved": run("retrieve", searched, facts={"seed": 0}), "second": sum(seen), "files": len(files)}
    out |= {"alone": run("retrieve", searched), "third": sum(seen)}
    out["same images"] = out["evaluated"][np.searchsorted(ids, searched, sorter=np.argsort(ids))]
    return out


def test_a_later_stage_takes_the_rows_that_an_earlier_one_has_computed(tmp_path: Path, digits: Store) -> None:
    found = pass_twice(tmp_path, digits.path, 70)
    assert found["files"] == 3
    assert (found["first"], found["second"], found["third"]) == (180 - 40, 0, 130)


def test_workers_compute_damaged_features_and_share_the_others(pool: Pool, tmp_path: Path, digits: Store) -> None:
    for harm in (False, True):
        answers = pool.run(pass_twice, tmp_path / f"{harm}", digits.path, 71, harm)
        for found in answers:
            assert torch.equal(found["retrieved"], found["alone"])
            assert torch.equal(found["retrieved"], answers[0]["retrieved"])
        assert all(found["first"] > 0 and found["third"] > 0 for found in answers)
        assert all((found["second"] > 0) == harm for found in answers)
