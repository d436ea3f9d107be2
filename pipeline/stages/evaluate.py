"""The stage `evaluate`: weighted kNN and a linear probe on frozen features, for the pretrained network, for the weights
that the recipe names, and for random weights.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, create_model
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.measures import BANK_MEASURE, Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import Splits, select_evenly_spaced
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.records import Count, RecordShape, Share
from firstlight.pipeline.stages.artifacts.companions import load_head
from firstlight.pipeline.stages.artifacts.table_folder import SavedTable, load_table
from firstlight.pipeline.stages.checks import (
    check_feature_layers,
    check_head_source,
    check_made_table,
    check_scored_images,
    check_target,
    check_test_split,
)
from firstlight.pipeline.stages.features.feature_scores import (
    LabelledFeatures,
    ScoringOptions,
    score_bank,
    score_features,
)
from firstlight.pipeline.stages.features.frozen_features import (
    build_extractors,
    check_head,
    compute_features,
)
from firstlight.pipeline.stages.features.projection import project_principal
from firstlight.pipeline.stages.features.shared_scores import find_shared_scores, hash_arms, share_scores
from firstlight.pipeline.stages.sections.evaluate import Evaluate
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind, StreamedBatch
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.feature_metrics import FEATURE_METRICS
from firstlight.tasks.nn.encoders import Encoder

EVALUATION_MAP_FILE, MAX_EVALUATION_MAP_IMAGES = "map.safetensors", 1000


def _split_ids(context: StageContext) -> list[np.ndarray]:
    """Returns the labelled ids to train, choose and test on; without the last where the recipe leaves the test split
    alone.
    """
    splits = context.splits
    wanted = (splits.train, splits.val, *([splits.test] if context.recipe.score_test else []))
    return [splits.with_target(ids, "label") for ids in wanted]


def _scoring_options(stage: Evaluate, context: StageContext) -> ScoringOptions:
    classes = len(context.store.classes)
    return ScoringOptions(stage.knn_k, stage.knn_temperature, stage.probe_weight_decays, classes)


def _save_evaluation_map(
    instance: StageInstance,
    features: dict[str, list[Tensor]],
    held_out: np.ndarray,
    ids: np.ndarray,
    others: Mapping[str, Tensor],
) -> None:
    """Saves where held-out images lie on a plane, by the deepest of the evaluated layers.

    Args:
        held_out: the range of their rows.
        others: the places of these images by arms that another stage has scored, as its map has them.
    """
    places = select_evenly_spaced(np.arange(*held_out), MAX_EVALUATION_MAP_IMAGES)
    if len(places) < 3 or not all(bool(torch.isfinite(layers[-1][places]).all()) for layers in features.values()):
        return
    found = {**others, "ids": torch.from_numpy(ids[places])}
    for arm, layers in features.items():
        points, share = project_principal(layers[-1][places].cpu().numpy())
        found |= {f"{arm}_points": torch.from_numpy(points.copy()), f"{arm}_share": torch.from_numpy(share.copy())}
    write_atomically(instance.folder / EVALUATION_MAP_FILE, save_tensors(found))


def _score_memory_bank(
    context: StageContext, stage: Evaluate, folder: Path, train: np.ndarray, sets: Sequence[LabelledFeatures]
) -> dict[str, float]:
    """Computes the accuracies of kNN over a saved memory bank.

    Args:
        train: the labelled ids whose rows are searched.
        sets: (held-out, test) features.
    """
    bank = load_table(folder)
    _check_bank_images("the memory bank", bank, context.store.hash, context.splits)
    # A bank may be stored in 16 bits.
    rows = bank.values[torch.from_numpy(np.searchsorted(bank.ids, train))].to(context.device).float()
    labels = torch.from_numpy(context.splits.labels[train]).to(context.device)
    return score_bank((rows, labels), sets, _scoring_options(stage, context))


class EvaluateStage(StageKind[Evaluate]):
    """Weighted kNN and a linear probe on frozen features, of a network with pretrained and with other weights."""

    section = Evaluate

    def run(self, context: StageContext, stage: Evaluate, instance: StageInstance) -> None:
        """Writes `result.json` into the instance's folder. Rank 0 fits the classifiers."""
        parts = _split_ids(context)
        ids = np.concatenate(parts)
        networks = build_extractors(context, stage, instance)
        keys = hash_arms(instance, networks)
        shared = find_shared_scores(instance, keys)
        own = {arm: network for arm, network in networks.items() if arm not in shared}
        features = compute_features(context, own, ids, instance, stage.batch_size)
        if rank() == 0:
            sizes = [len(part) for part in parts]
            labels = torch.from_numpy(context.splits.labels[ids]).to(context.device).split(sizes)
            options = _scoring_options(stage, context)
            result: dict[str, dict[str, Any]] = {
                arm: dict(shared[arm].scores) if arm in shared else {} for arm in networks
            }
            for arm, layers in features.items():
                for ending, layer in zip(stage.layer_suffixes, layers, strict=True):
                    found = score_features(list(zip(layer.split(sizes), labels, strict=True)), options)
                    result[arm] |= {f"{name}{ending}": value for name, value in found.items()}
            if stage.knn_bank:
                (head,) = features["pretrained"]
                sets = list(zip(head.split(sizes), labels, strict=True))[1:]
                found = _score_memory_bank(context, stage, instance.companions["bank"], parts[0], sets)
                result["pretrained"][BANK_MEASURE] = found
            places = [found.read_tensors(EVALUATION_MAP_FILE, arm) for arm, found in shared.items()]
            held_out = np.concatenate([[0], np.cumsum(sizes)])[1:3]
            _save_evaluation_map(instance, features, held_out, ids, dict(ChainMap(*places)))
            instance.write_result(result)
            share_scores(instance, {arm: key for arm, key in keys.items() if arm not in shared})
        barrier()

    def result_shape(self, stage: Evaluate) -> TypeAdapter[Any]:
        parts = {"knn": dict[str, Share], "probe": dict[str, float], "confusion": list[list[Count]]}
        parts |= {"signals": dict[str, float]}
        keys: dict[str, Any] = {
            f"{name}{ending}": (shape, ...) for name, shape in parts.items() for ending in stage.layer_suffixes
        }
        arm = create_model("FeatureScores", __base__=RecordShape, **keys)
        arms: dict[str, Any] = dict.fromkeys(stage.compared_arms, (arm, ...))
        if stage.knn_bank:
            keys = {BANK_MEASURE: (dict[str, Share], ...)}
            arms["pretrained"] = (create_model("BankScores", __base__=arm, **keys), ...)
        return TypeAdapter(create_model("EvaluationResult", __base__=RecordShape, **arms))

    def check_encoder(self, name: str, stage: Evaluate, recipe: Recipe, encoder: Encoder) -> None:
        check_feature_layers(f"stages.{name}", "layers", stage, encoder)
        if stage.knn_bank and stage.features != "head":
            raise UserError(
                f"stages.{name}.knn_bank: true is not valid with features: {stage.features}: a memory bank holds the "
                "outputs of a head; valid: features: head"
            )

    def check_source(self, name: str, stage: Evaluate, context: RecipeContext) -> None:
        check_target(f"stages.{name}", "label", context)
        check_test_split(f"stages.{name}", context)
        check_head_source(name, stage, context)
        source = context.recipe.encoder_source(name)
        if stage.knn_bank and source is not None and source.stage is not None:
            check_made_table(f"stages.{name}.knn_bank", "bank", context, source.stage)

    def check_companions(self, name: str, stage: Evaluate, recipe: Recipe, companions: Mapping[str, Path]) -> None:
        if "head" in companions:
            check_head(load_head(companions["head"]), recipe, f"stages.{name}")
        if "bank" in companions:
            size, dim = load_head(companions["head"]).spec["out"], load_table(companions["bank"]).values.shape[1:]
            if dim != (size,):
                raise UserError(
                    f"stages.{name}.knn_bank: the memory bank holds values of shape {tuple(dim)}, the head of "
                    f"{stage.encoder!r} gives {size} features; valid: false"
                )

    def check_companion_images(
        self, name: str, stage: Evaluate, companions: Mapping[str, Path], store: str, splits: Splits
    ) -> None:
        if "bank" in companions:
            where = f"stages.{name}.knn_bank: true is not valid: the memory bank of {stage.encoder!r}"
            _check_bank_images(where, load_table(companions["bank"]), store, splits)

    def check_images(self, name: str, stage: Evaluate, recipe: Recipe, splits: Splits) -> None:
        check_scored_images(recipe, splits, "label")

    def read_score(
        self, stage: Evaluate, measure: Measure, arm: str, split: str, instance: StageInstance
    ) -> float | None:
        """Returns a score. The score of random weights beside a memory bank is that of their embedded images."""
        is_baseline = measure.name == BANK_MEASURE and arm != "pretrained"
        return super().read_score(stage, replace(measure, name="knn") if is_baseline else measure, arm, split, instance)

    def objectives(self, stage: Evaluate) -> tuple[str, ...]:
        found = (f"{name}{ending}" for ending in stage.layer_suffixes for name in ("knn", "probe", *FEATURE_METRICS))
        return (*found, *((BANK_MEASURE,) if stage.knn_bank else ()))

    def read_objective(self, stage: Evaluate, name: str, instance: StageInstance) -> float:
        ending = next((ending for ending in stage.layer_suffixes if ending and name.endswith(ending)), "")
        metric = name.removesuffix(ending)
        if metric not in FEATURE_METRICS:
            return super().read_objective(stage, name, instance)
        result = instance.result
        assert result is not None
        return float(result[stage.compared_arms[0]][f"signals{ending}"][metric])

    def streamed_batches(self, stage: Evaluate, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        return [(stage.batch_size, [dataset.image_size])]


def _check_bank_images(where: str, bank: SavedTable, store: str, splits: Splits) -> None:
    """Checks that a memory bank is of the training images, no more and no fewer. `where`: the words before the error.

    Raises:
        UserError: it is of other images: those of another store, or with held-out images among them.
    """
    if bank.store != store:
        raise UserError(
            f"{where} is of the images of another store ({bank.store[:12]}, here {store[:12]}); valid: false"
        )
    if not np.array_equal(bank.ids, splits.train):
        missing, more = len(np.setdiff1d(splits.train, bank.ids)), len(np.setdiff1d(bank.ids, splits.train))
        raise UserError(
            f"{where} lacks {missing} of the {len(splits.train)} training images and has {more} others; valid: false, "
            "or the dataset keys (val_fraction, max_train) of its pretraining"
        )
