"""A Ray session: started when the first stage needs it, with finite timeouts, after a check of its resources."""

import contextlib
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from firstlight.pipeline.config.scale import ScaleOptions, StreamOptions
from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.run import nodes as machines
from firstlight.pipeline.run.ray_folder import RayFolder, make_ray_folder

# The time that an elastic group waits for its machines. If one is lost, it starts with fewer workers.
ELASTIC_START_S = 20
# CPUs that are always kept free for Ray Data: if workers took every CPU, it would wait forever.
MIN_DATA_CPUS = 1.0
# The text of Ray's error if it did not start within its 30 s.
SLOW_START = "timed out during startup"


class RaySession:
    """A Ray that `start` starts or joins, and that the end of the `with` block shuts down."""

    def __init__(
        self, scale: ScaleOptions, stream: StreamOptions | None = None, notify: Callable[[str], None] | None = None
    ) -> None:
        """Takes `notify`, which is called with messages for the user during a wait."""
        self.scale, self.stream, self.started = scale, stream or StreamOptions(), False
        self.notify = notify or (lambda line: None)
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._cleanup:
            if self.started:
                import ray

                if self.scale.address != "local" and self.scale.wait_s:
                    machines.withdraw_request()
                ray.shutdown()

    def start(self, always: bool = False) -> bool:
        """Starts or joins Ray, once. Returns True if Ray runs.

        Nothing is started for `scale.workers: 0`, unless `always`. A Ray that this process has started before, or that
        runs this process, is used and not shut down.

        Raises:
            UserError: the cluster cannot be reached, or has too few CPUs or GPUs.
        """
        if self.started or (self.scale.max_workers == 0 and not always):
            return self.started
        _set_environment(self.scale)
        close_token_file()
        import ray
        from ray.util.annotations import RayDeprecationWarning

        if not is_verbose():
            warnings.simplefilter("ignore", RayDeprecationWarning)
        if ray.is_initialized():
            return True
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if not is_verbose():
            # Besides the output of workers, Ray prints a line to stdout for every process that died.
            ray._private.worker._worker_logs_enabled = False
        folder = self._cleanup.enter_context(make_ray_folder()) if self.scale.address == "local" else None
        _init_ray(self.scale, folder)
        self.started = True
        if threading.current_thread() is threading.main_thread():
            # Ray has replaced the handlers by its own, which abort the process.
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.scale.address != "local":
            machines.wait_for_nodes(
                self.scale, count_data_cpus(self.scale, self.stream), self._check_nodes, self.notify
            )
        return True

    def _check_nodes(self, nodes: Sequence[machines.Node]) -> None:
        where = f"the cluster at {self.scale.address!r}"
        check_cluster_resources(
            self.scale, self.stream, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), where
        )
        machines.check_worker_fit(self.scale, nodes, where)


def is_verbose() -> bool:
    """Returns True if the command was called with `-v`."""
    return "FIRSTLIGHT_VERBOSE" in os.environ


def close_token_file() -> None:
    """Makes the file of a cluster's token readable for its owner only; Ray writes it readable for everybody."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    with contextlib.suppress(OSError):
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)


def count_local_cpus(scale: ScaleOptions) -> int:
    return scale.cpus or os.cpu_count() or 1


def check_local_resources(scale: ScaleOptions, stream: StreamOptions) -> None:
    """Checks the resources of this machine as those of a cluster, before Ray starts."""
    if scale.max_workers and scale.address == "local":
        check_cluster_resources(scale, stream, count_local_cpus(scale), torch.cuda.device_count(), "this machine")


def count_data_cpus(scale: ScaleOptions, stream: StreamOptions, workers: int | None = None) -> float:
    """Returns the CPUs that are kept free for decoding for `workers` workers, by default the maximum."""
    return max(MIN_DATA_CPUS, count_decoding_cpus(stream, max(scale.max_workers if workers is None else workers, 1)))


def count_decoding_cpus(stream: StreamOptions, workers: int) -> float:
    """Returns the CPUs that decoding for `workers` workers needs at least.

    The workers step together, and a task that waits for its worker to take a batch keeps its CPUs. While all tasks of
    the other workers wait, one task of the last worker must still be able to run.
    """
    return ((workers - 1) * stream.count_tasks(on_ray=True) + 1) * stream.task_cpus


def check_cluster_resources(scale: ScaleOptions, stream: StreamOptions, cpus: float, gpus: float, where: str) -> None:
    """Checks that the minimum of workers and the CPUs for decoding fit. `where` names the machine or cluster.

    Raises:
        UserError: names the key, the resources that are needed and those that there are.
    """
    workers = scale.min_workers
    data = count_data_cpus(scale, stream, workers)
    need = workers * scale.cpus_per_worker + data
    if need > cpus:
        smaller = (
            "scale.cpus_per_worker"
            if data == MIN_DATA_CPUS
            else "scale.cpus_per_worker, stream.tasks or stream.task_cpus"
        )
        raise UserError(
            f"scale.workers: {workers} workers x {scale.cpus_per_worker:g} CPUs + {data:g} CPU for data need {need:g} "
            f"CPUs, {where} has {cpus:g}; valid: fewer workers or a smaller {smaller}"
        )
    if workers * scale.worker_gpus > gpus:
        raise UserError(
            f"scale.gpus_per_worker: {workers} workers x {scale.worker_gpus:g} need "
            f"{workers * scale.worker_gpus:g} GPUs, {where} has {gpus:g}; valid: 0 to {gpus / workers:g}"
        )


def _set_environment(scale: ScaleOptions) -> None:
    """Sets variables that Ray reads when it is imported, except those that the user has set."""
    defaults = {
        "RAY_DATA_LOG_LEVEL": "INFO" if is_verbose() else "ERROR",
        # Ray's default waits for a lost rank forever.
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(scale.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(
            max(120, scale.wait_s) if scale.min_workers == scale.max_workers else ELASTIC_START_S
        ),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Nobody takes this machine away with a notice, and the watcher is an actor to start.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0" if scale.address == "local" else "1",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Otherwise a thread that outlives Ray would start another one.
        "RAY_ENABLE_AUTO_CONNECT": "0",
    }
    # A token for this run only, so that nothing is written to the home folder.
    if scale.address == "local" and "ray" not in sys.modules:
        defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        # All processes of Ray listen at 127.0.0.1 only if clusters are off, whatever the system.
        defaults |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def _init_ray(scale: ScaleOptions, folder: RayFolder | None) -> None:
    """Starts Ray in `folder`, or joins one.

    Raises:
        UserError: the cluster cannot be joined, the folder cannot be written, or Ray does not start in time.
    """
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(**_ray_arguments(scale, folder))
    except (AuthenticationError, OSError, RuntimeError) as error:
        if folder is not None and isinstance(error, OSError) and not isinstance(error, ConnectionError):
            raise UserError(f"TMPDIR: Ray cannot start in {folder.path}: {one_line(error)}") from None
        no_token = isinstance(error, AuthenticationError)
        reason = "this machine has no token" if no_token else one_line(str(error).splitlines()[0])
        hint = "; a cluster with a token needs RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
        raise UserError(
            f"scale.address: {scale.address!r} cannot be joined: {reason}{'' if scale.address == 'local' else hint}"
        ) from None
    # Ray raises a plain Exception; there is no narrower class.
    except Exception as error:
        if SLOW_START not in str(error):
            raise
        raise UserError(
            f"scale.address: {scale.address!r}: Ray did not start within 30 s, as happens where other work keeps the "
            "machine busy; valid: try again, or scale.workers: 0, which needs no Ray"
        ) from None


def _ray_arguments(scale: ScaleOptions, folder: RayFolder | None) -> dict[str, Any]:
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": is_verbose()}
    if folder is None:
        return {"address": scale.address, **common}
    return {
        "address": "local",
        "num_cpus": count_local_cpus(scale),
        "include_dashboard": False,
        "object_store_memory": scale.object_store_bytes,
        "_temp_dir": str(folder.path),
        # Pages of metrics that nobody reads, for everybody on the machine.
        "_system_config": {"enable_metrics_collection": False},
        **({"object_spilling_directory": str(folder.spilling)} if folder.spilling else {}),
        **common,
    }
