"""Ray: started when the first stage needs it, with the settings that make failures finite, and checked for room before anything is placed."""

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
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import nodes as machines

ELASTIC_START_S = (
    20  # that an elastic group waits for its machines: one of them may be lost, and then fewer workers will do
)
MIN_DATA_CPUS = 1.0  # kept free for Ray Data, at the least: with every CPU taken by workers, it would wait for ever


class RaySession:
    """A Ray that is not there until `start`, and gone after the `with` block."""

    def __init__(
        self, scale: ScaleOptions, stream: StreamOptions | None = None, notify: Callable[[str], None] | None = None
    ) -> None:
        """`tell`: is given what the user should know while he waits."""
        self.scale, self.stream, self.started = scale, stream or StreamOptions(), False
        self.notify = notify or (lambda line: None)

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.started:
            import ray

            if self.scale.address != "local" and self.scale.wait_s:
                machines.withdraw_request()
            ray.shutdown()

    def start(self, always: bool = False) -> bool:
        """Start or join Ray, once; whether it is there. For `scale.workers: 0` it is not, but `always`. In a process that Ray itself runs, or
        that has started it, it is there already, and stays.

        Raises:
            UserError: the cluster cannot be reached, or has too few CPUs or GPUs.
        """
        if self.started or (self.scale.max_workers == 0 and not always):
            return self.started
        _set_environment(self.scale)
        close_token_file()
        import ray
        from ray.exceptions import AuthenticationError
        from ray.util.annotations import RayDeprecationWarning

        if not is_verbose():
            warnings.simplefilter("ignore", RayDeprecationWarning)
        if ray.is_initialized():
            return True
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(**_ray_arguments(self.scale))
        except (AuthenticationError, ConnectionError, RuntimeError) as error:
            told = "this machine has no token" if isinstance(error, AuthenticationError) else str(error).splitlines()[0]
            wanted = (
                ""
                if self.scale.address == "local"
                else "; a cluster with a token wants RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
            )
            raise UserError(f"scale.address: {self.scale.address!r} cannot be joined: {told}{wanted}") from None
        self.started = True
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray has put its own in their place, which abort the process
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
    """`-v` was given."""
    return "FIRSTLIGHT_VERBOSE" in os.environ


def close_token_file() -> None:
    """Ray writes the token of a cluster for everybody on the machine to read: from now on only its owner can."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    with contextlib.suppress(OSError):
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)


def count_local_cpus(scale: ScaleOptions) -> int:
    return scale.cpus or os.cpu_count() or 1


def check_local_resources(scale: ScaleOptions, stream: StreamOptions) -> None:
    """The same check as for a cluster, before Ray starts on this machine."""
    if scale.max_workers and scale.address == "local":
        check_cluster_resources(scale, stream, count_local_cpus(scale), torch.cuda.device_count(), "this machine")


def count_data_cpus(scale: ScaleOptions, stream: StreamOptions, workers: int | None = None) -> float:
    """What is kept free for decoding for so many workers (None: the most)."""
    return max(MIN_DATA_CPUS, count_decoding_cpus(stream, max(scale.max_workers if workers is None else workers, 1)))


def count_decoding_cpus(stream: StreamOptions, workers: int) -> float:
    """What decoding for so many workers cannot do without. They step together, and tasks that wait for theirs to take a batch keep their CPUs: with
    all those of the other workers waiting, there must still be room for one task of the last."""
    return ((workers - 1) * stream.tasks + 1) * stream.task_cpus


def check_cluster_resources(scale: ScaleOptions, stream: StreamOptions, cpus: float, gpus: float, where: str) -> None:
    """Workers (the fewest), and the CPUs that decoding needs, must fit.

    Raises:
        UserError: names the key, what is needed and what there is.
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
            f"scale.workers: {workers} workers x {scale.cpus_per_worker:g} CPUs + {data:g} CPU for data need {need:g} CPUs, "
            f"{where} has {cpus:g}; valid: fewer workers or a smaller {smaller}"
        )
    if workers * scale.gpus_per_worker > gpus:
        raise UserError(
            f"scale.gpus_per_worker: {workers} workers x {scale.gpus_per_worker:g} need {workers * scale.gpus_per_worker:g} GPUs, "
            f"{where} has {gpus:g}; valid: 0 to {gpus / workers:g}"
        )


def _set_environment(scale: ScaleOptions) -> None:
    """Read by Ray when it is imported. What the user has set stays."""
    defaults = {
        "RAY_DATA_LOG_LEVEL": "INFO" if is_verbose() else "ERROR",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(
            scale.collective_timeout_s
        ),  # Ray's default waits for a lost rank for ever
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(
            max(120, scale.wait_s) if scale.min_workers == scale.max_workers else ELASTIC_START_S
        ),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that is left over when Ray has been shut down would start another
    }
    if (
        scale.address == "local" and "ray" not in sys.modules
    ):  # a token of this run only; nothing is written to the home folder
        defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def _ray_arguments(scale: ScaleOptions) -> dict[str, Any]:
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": is_verbose()}
    if scale.address != "local":
        return {"address": scale.address, **common}
    return {
        "address": "local",
        "num_cpus": count_local_cpus(scale),
        "include_dashboard": False,
        "object_store_memory": scale.object_store_mb * 2**20,
        **common,
    }
