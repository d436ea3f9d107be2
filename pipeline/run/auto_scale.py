"""The meaning of `auto` on the machines at hand: workers, their GPUs, number formats, loading of images."""

from dataclasses import dataclass

import torch

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import AUTO, ScaleOptions
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.run.memory import choose_object_store, choose_tasks
from firstlight.pipeline.run.nodes import list_live_nodes
from firstlight.pipeline.run.ray_session import RaySession
from firstlight.pipeline.terminal import format_count
from firstlight.pipeline.train.accelerator.cpu import multiplies_bf16_faster
from firstlight.pipeline.train.backward_pass import resolve_precision
from firstlight.pipeline.usable_cpus import count_decoders, count_usable_cpus


@dataclass(frozen=True)
class FoundGpus:
    """The GPUs of this machine, or of a cluster, whose GPUs have no `name` here."""

    count: int
    name: str | None = None


def resolve_scale(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Replaces `auto` in `scale.workers`, `scale.gpus_per_worker`, the precision of stages, and, on this machine, in
    `stream.tasks` of workers on GPUs and in `scale.object_store_mb`.

    Returns the recipe, and a line that says what was chosen; None if there was nothing to choose. A cluster is asked
    for its nodes; the precision of trainings on its GPUs is chosen on its workers.

    Raises:
        UserError: the cluster cannot be joined.
    """
    recipe, words = _resolve_workers(recipe)
    recipe, tasks = _resolve_loading(recipe)
    line = ", ".join([*words, *tasks])
    return recipe, f"chosen: {line}" if line else None


def _resolve_workers(recipe: Recipe) -> tuple[Recipe, list[str]]:
    asks_precision = any(getattr(stage, "precision", None) == AUTO for stage in recipe.stages.values())
    if recipe.scale.is_resolved and not asks_precision:
        return recipe, []
    is_local = recipe.scale.address == "local"
    gpus = find_local_gpus() if is_local else _find_cluster_gpus(recipe.scale)
    scale = choose_scale(recipe.scale, gpus.count)
    on_gpu = scale.worker_gpus > 0
    who = format_count(scale.max_workers, "worker") if scale.max_workers else "this process"
    words = [f"{who} on {_describe_place(scale, gpus)}"]
    if asks_precision:
        recipe, chosen = _resolve_precisions(recipe, is_local, on_gpu)
        words += chosen
    return recipe.model_copy(update={"scale": scale}), words


def _resolve_precisions(recipe: Recipe, is_local: bool, on_gpu: bool) -> tuple[Recipe, list[str]]:
    in_bf16 = is_local and not on_gpu and multiplies_bf16_faster()
    best = "bf16" if in_bf16 else resolve_precision(AUTO, torch.device("cuda" if on_gpu and is_local else "cpu"))
    trained = best if is_local or not on_gpu else AUTO
    # Features are compared, so that all workers compute them alike. No loss is scaled that would show that a feature is
    # beyond fp16.
    features = best if best == "bf16" else "fp32"
    stages, of_trainings, of_features = dict(recipe.stages), list[str](), list[str]()
    for name, stage in recipe.stages.items():
        if getattr(stage, "precision", None) == AUTO:
            is_training = isinstance(stage, TrainingOptions)
            precision = trained if is_training else features
            stages[name] = stage.model_copy(update={"precision": precision})
            (of_trainings if is_training else of_features).append(precision)
    words = [f"precision {trained}"] if of_trainings and trained != AUTO else []
    words += [f"features in {features}"] if set(of_features) - set(of_trainings) else []
    return recipe.model_copy(update={"stages": stages}), words


def _resolve_loading(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Chooses the decoding tasks of workers on this machine's GPUs, and the size of Ray's object store."""
    scale, stream, words = recipe.scale, recipe.stream, list[str]()
    if scale.address != "local":
        return recipe, words
    if stream.tasks == AUTO and scale.worker_gpus:
        # A worker's share of the CPUs is that of the GPUs, as other runs and trials may have the rest.
        share = (scale.cpus or count_usable_cpus()) * scale.worker_gpus / max(find_local_gpus().count, 1)
        tasks = choose_tasks(recipe, count_decoders(share))
        stream = stream.model_copy(update={"tasks": tasks})
        words.append(f"{tasks} decoding tasks" + (" each" if scale.max_workers > 1 else ""))
    if scale.object_store_mb == AUTO and scale.max_workers:
        store = choose_object_store(recipe, stream.count_tasks(on_ray=True))
        scale = scale.model_copy(update={"object_store_mb": store})
    return recipe.model_copy(update={"scale": scale, "stream": stream}), words


def choose_scale(scale: ScaleOptions, gpus: int) -> ScaleOptions:
    """Returns a scale without `auto`, where there are `gpus` GPUs."""
    workers = scale.workers
    if workers == AUTO:
        share = scale.worker_gpus if scale.gpus_per_worker != AUTO else min(gpus, 1.0)
        # One worker would have the CPUs that the process of the command has too, and Ray takes seconds to start.
        on_cpus = 0 if scale.address == "local" else 1
        workers = max(int(gpus / share), 1) if share else on_cpus
    chosen = scale.model_copy(update={"workers": workers})
    if scale.gpus_per_worker == AUTO:
        chosen = chosen.model_copy(update={"gpus_per_worker": 1.0 if gpus >= max(chosen.min_workers, 1) else 0.0})
    return chosen


def find_local_gpus() -> FoundGpus:
    """Returns the GPUs of this machine that torch can use."""
    count = torch.cuda.device_count()
    return FoundGpus(count, torch.cuda.get_device_name(0) if count else None)


def _find_cluster_gpus(scale: ScaleOptions) -> FoundGpus:
    """Joins the cluster for as long as its nodes are counted."""
    with RaySession(scale.model_copy(update={"workers": 0, "gpus_per_worker": 0.0, "wait_s": 0})) as session:
        session.start(always=True)
        return FoundGpus(int(sum(node.gpus for node in list_live_nodes())))


def _describe_place(scale: ScaleOptions, gpus: FoundGpus) -> str:
    if scale.worker_gpus:
        name = f" ({gpus.name})" if gpus.name else ""
        return f"{format_count(scale.worker_gpus * max(scale.max_workers, 1), 'GPU')}{name}"
    return "the CPUs" + ("" if not gpus.count else f", though there are {format_count(gpus.count, 'GPU')}")
