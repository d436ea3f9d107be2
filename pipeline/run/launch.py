"""Runs stages on the training workers: in Ray Train's TorchTrainer, or in this process if `scale.workers` is 0."""

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.data.mirror.places import name_location
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import Paused, StageFailed, Stopped, StopTraining, UserError
from firstlight.pipeline.run.launching.instances import PART_KEY, run_instances
from firstlight.pipeline.run.launching.side_processes import SideProcesses
from firstlight.pipeline.run.launching.threads import fix_threads
from firstlight.pipeline.run.mirroring import check_results, share_folders
from firstlight.pipeline.run.ray_session import count_decoding_cpus, is_verbose
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures, watchdog
from firstlight.pipeline.train.attempts import read_attempts
from firstlight.tasks.extensions.error_text import take_last_line

STOP_TYPES: dict[str, type[StopTraining | UserError]] = {cls.__name__: cls for cls in (Stopped, Paused, UserError)}
# The time that a function has to end after it was asked to stop.
STOP_GRACE_S = 10.0


def launch_instances(
    recipe: Recipe, store: Store, instances: Sequence[StageInstance], others: SideProcesses | None = None
) -> None:
    """Runs the instances in order, each on all workers together. The results are in the instances' folders.

    `others`: processes that share the instances with this one where there are no workers.

    Raises:
        StopTraining: the training cannot continue: a loss is not finite, the disk is full, or an error occurred twice.
        UserError: a file that a worker reads is damaged.
        Stopped: the user asked it to stop.
        Paused: it has reached the step at which it was to pause.
        StageFailed: workers died or raised more often than `scale.max_failures`.
    """
    for instance in instances:
        failures.delete_failures(instance.folder)
        watchdog.delete_hang_record(instance.folder)
    payload = {
        "recipe": fix_threads(recipe, instances[0].stage).dump(),
        "store": store.location,
        "instances": [_name_paths(asdict(instance)) for instance in instances],
    }
    if recipe.scale.max_workers == 0:
        answer = _launch_in_process(recipe, payload, others)
    else:
        with share_folders(recipe, instances):
            answer = _launch_on_ray(recipe, payload, instances[0].folder.parent / ".ray")
    if answer["stop"] is not None:
        raise STOP_TYPES.get(answer["kind"], StopTraining)(answer["stop"])
    check_results(instances)


def _name_paths(value: Any) -> Any:
    """Returns the fields of an instance with names instead of its paths, which every machine knows."""
    if isinstance(value, Mapping):
        return {key: _name_paths(item) for key, item in value.items()}
    return name_location(value) if isinstance(value, Path) else value


def _launch_in_process(recipe: Recipe, payload: dict[str, Any], others: SideProcesses | None) -> dict[str, Any]:
    device = torch.device("cuda" if recipe.scale.worker_gpus else "cpu")
    run_here = partial(run_instances, on_ray=False, device=device)
    if others is None or others.most == 0:
        return run_here(payload)
    answer: dict[str, Any] = {"stop": None}
    for work in (*_list_rounds(recipe, payload["instances"], others.most + 1), payload["instances"]):
        if answer["stop"] is None:
            together = {**payload, "instances": work}
            answer = others.run(together, run_here) if len(work) > 1 else run_here(together)
    return answer


def _list_rounds(recipe: Recipe, instances: list[dict[str, Any]], processes: int) -> list[list[dict[str, Any]]]:
    """Returns the parts of the instances of a stage by rounds, if they share the processes more evenly than the
    instances do.
    """
    if len(instances) % processes == 0:
        return []
    stage = recipe.stages[instances[0]["stage"]]
    rounds = stage_kind(stage).list_rounds(stage)
    return [[{**fields, PART_KEY: part} for fields in instances for part in parts] for parts in rounds]


def _train_function(config: dict[str, Any]) -> dict[str, Any]:
    import ray
    import ray.train
    from ray.train.torch import get_device

    workers = ray.train.get_context().get_world_size()
    wrong = describe_crowding(parse_recipe(config["recipe"]), workers, ray.cluster_resources().get("CPU", 0.0))
    if wrong:
        return {"stop": wrong, "kind": StopTraining.__name__}
    device = get_device()
    # Collectives over objects use the current device.
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if parse_recipe(config["recipe"]).scale.address == "local":
        return run_instances(config, on_ray=True, device=device)
    with failures.preemption_from(_read_preemption):
        return run_instances(config, on_ray=True, device=device)


def _read_preemption() -> failures.PreemptionNotice | None:
    """Returns Ray's notice that machines of this training are about to be taken away. It is collective."""
    import ray.train

    found = ray.train.get_preemption_info()
    return (
        None
        if found is None
        else failures.PreemptionNotice(len(found.preempted_node_ids), tuple(found.preempted_ranks))
    )


def describe_crowding(recipe: Recipe, workers: int, cpus: float) -> str | None:
    """Returns an error message if the workers leave too few CPUs of the cluster for decoding, None otherwise.

    An elastic group takes all CPUs that it finds; without any for decoding, the first batch would never come.
    """
    left, need = cpus - workers * recipe.scale.cpus_per_worker, count_decoding_cpus(recipe.stream, workers)
    if left >= need:
        return None
    return (
        f"scale.workers: {workers} workers leave {left:g} CPUs of the cluster, and decoding for them needs {need:g}; "
        "valid: a smaller maximum, or a scale.cpus_per_worker that leaves some CPUs on every machine"
    )


def _launch_on_ray(recipe: Recipe, payload: dict[str, Any], storage: Path) -> dict[str, Any]:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    scale = recipe.scale
    if not is_verbose():
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    resources = {"CPU": scale.cpus_per_worker, **({"GPU": scale.worker_gpus} if scale.worker_gpus else {})}
    environment = {key: os.environ[key] for key in (failures.FAULT_VARIABLE,) if key in os.environ}
    trainer = TorchTrainer(
        _train_function,  # type: ignore[arg-type]
        train_loop_config=payload,
        torch_config=TorchConfig(timeout_s=scale.collective_timeout_s),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=scale.workers,  # type: ignore[arg-type]
            use_gpu=scale.worker_gpus > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=scale.resize_s,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            # A name that was used before would make Ray continue that run by its own rules.
            name=f"{recipe.name}-{uuid.uuid4().hex[:8]}",
            # Ray checks that all machines see it; a working folder is seen by one.
            storage_path=str(storage) if scale.address == "local" else name_location(storage),
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=scale.max_failures,
                controller_failure_limit=3,
            ),
            worker_runtime_env={"env_vars": environment},
            logging_config=ray.train.LoggingConfig(log_level="INFO" if is_verbose() else "CRITICAL"),
        ),
    )
    try:
        answer = run_interruptibly(trainer.fit).return_value
    except TrainingFailedError as error:
        hung = next(filter(_last_attempt_hung, (Path(fields["folder"]) for fields in payload["instances"])), None)
        raise StageFailed(
            _describe_training_failure(error, scale) if hung is None else _describe_hang(hung, scale)
        ) from error
    assert isinstance(answer, dict)
    return answer


def run_interruptibly(function: Callable[[], Any], stop: Callable[[], None] | None = None) -> Any:
    """Calls `function` in a thread and waits for it, so that Ctrl-C and SIGTERM interrupt this thread.

    In the main thread, Ray would replace the signal handlers. `stop` is called when this thread is interrupted; then
    the function has STOP_GRACE_S seconds to end.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True, name="trainer")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt:
        if stop:
            stop()
            thread.join(STOP_GRACE_S)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _last_attempt_hung(folder: Path) -> bool:
    """Returns True if the last attempt hung."""
    work = read_attempts(folder)
    return watchdog.has_hung(folder) and work is not None and work.ended is None


def _describe_hang(folder: Path, scale: ScaleOptions) -> str:
    timeout = f"scale.collective_timeout_s: {scale.collective_timeout_s}"
    return f"{folder.name}: no step was made within {timeout}; its stack is in {folder / watchdog.HANG_FILE}"


def _describe_training_failure(error: BaseException, scale: ScaleOptions) -> str:
    """Returns the innermost cause of a failed training in one line, with the rank if Ray knows it."""
    if of_ranks := getattr(error, "worker_failures", None):
        return failures.describe_cause(of_ranks, scale.max_workers, scale.collective_timeout_s)
    return f"{type(error).__name__}: {take_last_line(error) or 'unknown'}"
