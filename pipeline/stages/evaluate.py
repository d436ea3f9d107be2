"""The stage `evaluate`: weighted kNN and a linear probe on frozen features, for the pretrained network and for random
weights.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import check_distinct
from firstlight.pipeline.config.stages import FeatureStage
from firstlight.pipeline.data.splits import Splits, select_evenly_spaced
from firstlight.pipeline.files import write_atomically, write_json
from firstlight.pipeline.stages.artifacts import load_head
from firstlight.pipeline.stages.checks import (
    check_feature_layers,
    check_head_source,
    check_scored_images,
    check_target,
    check_test_split,
)
from firstlight.pipeline.stages.features.frozen_features import (
    FEATURE_ARMS,
    build_extractors,
    check_head,
    compute_features,
    describe_features,
    label_features,
)
from firstlight.pipeline.stages.features.projection import project_principal
from firstlight.pipeline.stages.stage import RESULT_FILE, StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.downstream.knn import class_scores, is_label_in_top
from firstlight.tasks.downstream.probe import choose_probe
from firstlight.tasks.feature_metrics import FEATURE_METRICS, compute_feature_metrics
from firstlight.tasks.nn.encoders import Encoder

LabelledFeatures = tuple[Tensor, Tensor]  # (n, d) features, (n,) labels
EVALUATION_MAP_FILE, MAX_EVALUATION_MAP_IMAGES = "map.safetensors", 1000
# The top-k accuracy that is reported as well, where there are more classes.
TOP_K = 5


class Evaluate(FeatureStage):
    """Scores frozen features by weighted kNN and by a linear probe."""

    kind: Literal["evaluate"] = Field(description="The kind of the stage; by default the name of the stage.")
    layers: tuple[int, ...] = Field(
        (-1,),
        min_length=1,
        description="The encoder's maps that are evaluated, each on its own: 0 is the first, -1 the deepest.",
    )
    knn_k: int = Field(200, ge=1, description="The number of neighbours of weighted kNN.")
    knn_temperature: float = Field(0.1, gt=0.0, description="The temperature of the neighbours' weights.")
    probe_weight_decays: tuple[Annotated[float, Field(ge=0.0)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1),
        min_length=1,
        description="The weight decays that the linear probe is trained with; the best on held-out images is scored.",
    )

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        return check_distinct(layers, "a layer")

    @property
    def layer_suffixes(self) -> tuple[str, ...]:
        """The suffix of a measure's name in the results, for each layer; "" where there is one layer."""
        return ("",) if len(self.layers) == 1 else tuple(f"_layer{layer}" for layer in self.layers)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.layers

    @property
    def measures(self) -> tuple[Measure, ...]:
        labels = (("knn", "kNN", f"k={self.knn_k}"), ("probe", "linear probe", ""))
        return tuple(
            Measure(name + ending, label_features(label, detail, features), FEATURE_ARMS, "random weights")
            for ending, features in zip(self.layer_suffixes, describe_features(self), strict=True)
            for name, label, detail in labels
        )


def _split_ids(context: StageContext) -> list[np.ndarray]:
    """Returns the labelled ids to train, choose and test on; without the last where the recipe leaves the test split
    alone.
    """
    splits = context.splits
    wanted = (splits.train, splits.val, *([splits.test] if context.recipe.score_test else []))
    return [splits.with_target(ids, "label") for ids in wanted]


def _score_layer(stage: Evaluate, sets: list[LabelledFeatures], classes: int) -> dict[str, Any]:
    """Computes the accuracies of one layer from (training, held-out, test) features, with metrics and confusion matrix
    of the last set.
    """
    train, *held_out_sets = sets
    scored_sets = dict(zip(("val", "test"), held_out_sets, strict=False))
    val, (last, (shown, known)) = scored_sets["val"], list(scored_sets.items())[-1]
    vote = partial(class_scores, k=stage.knn_k, temperature=stage.knn_temperature, classes=classes)
    votes = {part: (vote(x, *train), y) for part, (x, y) in scored_sets.items()}
    probe, decay = choose_probe(train, val, classes, stage.probe_weight_decays)
    logits = {part: (probe.compute_scores(x), y) for part, (x, y) in scored_sets.items()}
    predicted = logits[last][0].argmax(1)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((known.cpu(), predicted.cpu()), torch.ones(len(predicted), dtype=torch.int64), accumulate=True)
    return {
        "knn": _compute_accuracies(votes),
        "probe": {**_compute_accuracies(logits), "weight_decay": decay},
        "confusion": confusion.tolist(),
        "signals": {"dimensions": shown.shape[1], **compute_feature_metrics(shown)},
    }


def _save_evaluation_map(
    instance: StageInstance, features: dict[str, list[Tensor]], held_out: np.ndarray, ids: np.ndarray
) -> None:
    """Saves where held-out images lie on a plane, by the deepest of the evaluated layers. `held_out`: the range of
    their rows.
    """
    places = select_evenly_spaced(np.arange(*held_out), MAX_EVALUATION_MAP_IMAGES)
    if len(places) < 3 or not all(bool(torch.isfinite(layers[-1][places]).all()) for layers in features.values()):
        return
    found = {"ids": torch.from_numpy(ids[places])}
    for arm, layers in features.items():
        points, share = project_principal(layers[-1][places].cpu().numpy())
        found |= {f"{arm}_points": torch.from_numpy(points.copy()), f"{arm}_share": torch.from_numpy(share.copy())}
    write_atomically(instance.folder / EVALUATION_MAP_FILE, save_tensors(found))


def _compute_accuracies(scored: dict[str, LabelledFeatures]) -> dict[str, float]:
    """Returns the shares of images whose label has the highest score, or one of the five highest, by split."""
    found = {
        part: float(is_label_in_top(scores, labels, 1).double().mean()) for part, (scores, labels) in scored.items()
    }
    if scored["val"][0].shape[1] > TOP_K:
        found |= {
            f"{part}_top{TOP_K}": float(is_label_in_top(scores, labels, TOP_K).double().mean())
            for part, (scores, labels) in scored.items()
        }
    return found


class EvaluateStage(StageKind[Evaluate]):
    """Weighted kNN and a linear probe on frozen features, of the pretrained network and of the same with random
    weights.
    """

    section = Evaluate

    def run(self, context: StageContext, stage: Evaluate, instance: StageInstance) -> None:
        """Writes `result.json` into the instance's folder. Rank 0 fits the classifiers."""
        parts = _split_ids(context)
        ids = np.concatenate(parts)
        features = compute_features(
            context, build_extractors(context, stage, instance), ids, instance, stage.batch_size
        )
        if rank() == 0:
            sizes = [len(part) for part in parts]
            labels = torch.from_numpy(context.splits.labels[ids]).to(context.device).split(sizes)
            result: dict[str, dict[str, Any]] = {arm: {} for arm in FEATURE_ARMS}
            for arm, layers in features.items():
                for ending, layer in zip(stage.layer_suffixes, layers, strict=True):
                    found = _score_layer(
                        stage, list(zip(layer.split(sizes), labels, strict=True)), len(context.store.classes)
                    )
                    result[arm] |= {f"{name}{ending}": value for name, value in found.items()}
            _save_evaluation_map(instance, features, np.concatenate([[0], np.cumsum(sizes)])[1:3], ids)
            write_json(instance.folder / RESULT_FILE, result)
        barrier()

    def check_encoder(self, name: str, stage: Evaluate, recipe: Recipe, encoder: Encoder) -> None:
        check_feature_layers(f"stages.{name}", "layers", stage, len(encoder.shapes))

    def check_source(self, name: str, stage: Evaluate, context: RecipeContext) -> None:
        check_target(f"stages.{name}", "label", context)
        check_test_split(f"stages.{name}", context)
        check_head_source(name, stage, context)

    def check_companion(self, name: str, stage: Evaluate, recipe: Recipe, folder: Path) -> None:
        check_head(load_head(folder), recipe, f"stages.{name}")

    def check_images(self, name: str, stage: Evaluate, recipe: Recipe, splits: Splits) -> None:
        check_scored_images(recipe, splits, "label")

    def objectives(self, stage: Evaluate) -> tuple[str, ...]:
        return tuple(
            f"{name}{ending}" for ending in stage.layer_suffixes for name in ("knn", "probe", *FEATURE_METRICS)
        )

    def read_objective(self, stage: Evaluate, name: str, instance: StageInstance) -> float:
        ending = next((ending for ending in stage.layer_suffixes if ending and name.endswith(ending)), "")
        metric = name.removesuffix(ending)
        if metric not in FEATURE_METRICS:
            return super().read_objective(stage, name, instance)
        result = instance.result
        assert result is not None
        return float(result["pretrained"][f"signals{ending}"][metric])

    def streamed_batches(self, stage: Evaluate, workers: int) -> list[tuple[int, int]]:
        return [(stage.batch_size, 1)]
