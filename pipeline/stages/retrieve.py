"""The stage `retrieve`: an index of a gallery's features, and how many of the images nearest to a query are of its
class.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, TypeAdapter, create_model
from torch import Tensor

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.records import Count, RecordShape, Share
from firstlight.pipeline.stages.artifacts.companions import load_head
from firstlight.pipeline.stages.checks import check_feature_layers, check_head_source, check_test_split
from firstlight.pipeline.stages.features.feature_index import INDEX_FOLDER, FeatureIndex, save_index
from firstlight.pipeline.stages.features.frozen_features import (
    build_extractors,
    check_head,
    compute_features,
)
from firstlight.pipeline.stages.features.nearest import NUM_NEIGHBOURS, choose_queries
from firstlight.pipeline.stages.sections.retrieve import Retrieve
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind, StageOutput, StreamedBatch
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream.retrieval import mean_average_precision, precision_at, remove_query
from firstlight.tasks.nn.encoders import Encoder


def gallery_ids(stage: Retrieve, splits: Splits) -> np.ndarray:
    """Returns the sorted ids that are searched."""
    ids = {
        "train": splits.train,
        "test": splits.test,
        "all": np.sort(np.concatenate((splits.train, splits.val, splits.test))),
    }[stage.gallery]
    return splits.with_target(ids, "label") if stage.labelled_gallery else ids


def query_ids(stage: Retrieve, splits: Splits) -> np.ndarray:
    return splits.val if stage.queries == "val" else splits.test


def _save_gallery(
    context: StageContext, stage: Retrieve, instance: StageInstance, index: FeatureIndex, arm: str
) -> None:
    columns = {"id": index.ids, "path": context.store.read_paths(index.ids), "label": context.splits.labels[index.ids]}
    looked = {
        key: value
        for key, value in stage.model_dump(mode="json").items()
        if key in ("features", "layer", "pool", "precision", "gallery", "labelled_gallery")
    }
    save_index(
        instance.folder / INDEX_FOLDER,
        index,
        pa.table(columns),
        {**looked, "arm": arm, "store": context.store.hash, "seed": instance.seed},
    )


def _measure_retrieval(
    stage: Retrieve, index: FeatureIndex, asked: tuple[np.ndarray, Tensor], labels: np.ndarray
) -> dict[str, Any]:
    """Returns what the queries, (ids, features), find and, where there are labels, how much of it is right."""
    ids, features = asked
    few = choose_queries(ids, labels)
    shown = _search_others(index, (ids[few], features[few]), NUM_NEIGHBOURS)
    out: dict[str, Any] = {
        "shown": [[query, row] for query, row in zip(ids[few].tolist(), shown.tolist(), strict=True)]
    }
    known, answered = labels[index.ids] >= 0, labels[ids] >= 0
    if not known.any() or not answered.any():
        return out
    labelled = (
        index
        if known.all()
        else FeatureIndex.from_features(
            index.ids[known], torch.from_numpy(index.vectors.reconstruct_n(0, len(known))[known])
        )
    )
    found = _search_others(labelled, (ids[answered], features[torch.from_numpy(answered)]), max(stage.precision_at))
    classes = torch.from_numpy(labels[ids[answered]])
    right = torch.from_numpy(labels[found]) == classes[:, None]
    of_class = torch.from_numpy(np.bincount(labels[labelled.ids], minlength=int(labels.max()) + 1))
    relevant = of_class[classes] - torch.from_numpy(np.isin(ids[answered], labelled.ids)).long()
    by_k = {str(k): value for k, value in precision_at(right, stage.precision_at).items()}
    return {**out, "precision": by_k, "mean_average_precision": mean_average_precision(right, relevant)}


def _search_others(index: FeatureIndex, asked: tuple[np.ndarray, Tensor], k: int) -> np.ndarray:
    """Returns (m, k) ids of the nearest images, never the query's own."""
    ids, features = asked
    return remove_query(torch.from_numpy(index.search(features, k + 1)[0]), torch.from_numpy(ids)).numpy()


class _ArmShape(RecordShape):
    """The images that the queries of an arm find, as ids for pictures, and the scores where there are labels."""

    shown: list[Annotated[list[Count | list[int]], Field(min_length=2, max_length=2)]]
    precision: dict[str, Share] = Field({})
    mean_average_precision: Share = 0.0


class RetrieveStage(StageKind[Retrieve]):
    """An index of features, and how many of the images found are right."""

    section = Retrieve

    def outputs(self, stage: Retrieve, instance: StageInstance) -> list[StageOutput]:
        folder = instance.folder / INDEX_FOLDER
        return [StageOutput("index", folder, f'fl.open_index("{folder}")')]

    def run(self, context: StageContext, stage: Retrieve, instance: StageInstance) -> None:
        """Writes `index/` of the features of the first arm and `result.json` into the instance's folder.

        All workers compute features; rank 0 searches.
        """
        searched, asked = gallery_ids(stage, context.splits), query_ids(stage, context.splits)
        ids = np.union1d(searched, asked)
        swept = compute_features(context, build_extractors(context, stage, instance), ids, instance, stage.batch_size)
        if rank() == 0:
            result: dict[str, Any] = {"gallery": len(searched), "queries": len(asked)}
            for arm, (features,) in swept.items():
                index = FeatureIndex.from_features(searched, features[np.searchsorted(ids, searched)])
                if arm == stage.compared_arms[0]:
                    _save_gallery(context, stage, instance, index, arm)
                result[arm] = _measure_retrieval(
                    stage, index, (asked, features[np.searchsorted(ids, asked)]), context.splits.labels
                )
            instance.write_result(result)
        barrier()

    def result_shape(self, stage: Retrieve) -> TypeAdapter[Any]:
        arms: dict[str, Any] = dict.fromkeys(stage.compared_arms, (_ArmShape, ...))
        keys: dict[str, Any] = {"gallery": (Count, ...), "queries": (Count, ...)}
        return TypeAdapter(create_model("RetrievalResult", __base__=RecordShape, **keys, **arms))

    def check_encoder(self, name: str, stage: Retrieve, recipe: Recipe, encoder: Encoder) -> None:
        check_feature_layers(f"stages.{name}", "layer", stage, encoder)

    def check_source(self, name: str, stage: Retrieve, context: RecipeContext) -> None:
        if "test" in (stage.queries, stage.gallery):
            check_test_split(f"stages.{name}", context)
        check_head_source(name, stage, context)

    def check_companions(self, name: str, stage: Retrieve, recipe: Recipe, companions: Mapping[str, Path]) -> None:
        if "head" in companions:
            check_head(load_head(companions["head"]), recipe, f"stages.{name}")

    def check_images(self, name: str, stage: Retrieve, recipe: Recipe, splits: Splits) -> None:
        _check_gallery(f"stages.{name}", stage, splits, max(recipe.scale.max_workers, 1))

    def read_score(
        self, stage: Retrieve, measure: Measure, arm: str, split: str, instance: StageInstance
    ) -> float | None:
        """Returns the precision of the stage's queries, whichever split they are from; None if no image has a label."""
        result = instance.result or {}
        value = result[arm].get("precision", {}).get(measure.name.removeprefix("precision@"))
        return None if value is None else float(value)

    def objectives(self, stage: Retrieve) -> tuple[str, ...]:
        return (*super().objectives(stage), "mean_average_precision")

    def is_share_objective(self, stage: Retrieve, name: str) -> bool:
        return True

    def read_objective(self, stage: Retrieve, name: str, instance: StageInstance) -> float:
        if name != "mean_average_precision":
            return super().read_objective(stage, name, instance)
        result = instance.result
        assert result is not None
        return float(result[stage.compared_arms[0]][name])

    def streamed_batches(self, stage: Retrieve, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        return [(stage.batch_size, [dataset.image_size])]


def _check_gallery(where: str, stage: Retrieve, splits: Splits, workers: int) -> None:
    """Checks that a query can find enough images besides itself."""
    searched, asked = gallery_ids(stage, splits), query_ids(stage, splits)
    if len(asked) < workers:
        raise UserError(f"{where}.queries: {stage.queries!r} has {len(asked)} images for {workers} workers: too few")
    known = searched[splits.labels[searched] >= 0]
    if stage.labelled_gallery and not len(known):
        raise UserError(
            f"{where}.labelled_gallery: true leaves no image: none of {stage.gallery!r} has a label; valid: false"
        )
    searched = known if len(known) else searched
    others = len(searched) - bool(np.isin(asked, searched).any())
    if max(stage.precision_at) > others:
        raise UserError(
            f"{where}.precision_at: {max(stage.precision_at)} is more than the {others} images that a query can find; "
            f"valid: 1 to {others}"
        )
