"""A Ray cluster whose autoscaler starts machines on demand, as raylets on this one, by Ray's provider for tests."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from firstlight.pipeline.cli.ui import free_port

MACHINE = {"CPU": 2, "object_store_memory": 100 * 2**20}


def configuration(address: str, most: int) -> dict[str, Any]:
    """Returns the file of a cluster with a head without CPUs and up to `most` machines, none at the start."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "machine": {"resources": MACHINE, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    provider = {
        "type": "fake_multinode",
        "gcs_address": address,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
    }
    nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "growing",
        "provider": {**provider, "disable_launch_config_check": True},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 10,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in nothing},
    }


@contextlib.contextmanager
def growing(folder: Path, most: int) -> Iterator[str]:
    """Starts such a cluster, yields its address and ends its processes."""
    file, address = folder / "autoscaling.json", f"127.0.0.1:{free_port(6390)}"
    file.write_text(json.dumps(configuration(address, most)))
    ray_command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={address.rpartition(':')[2]}",
        "--num-cpus=0",
    ]
    options = [
        "--node-ip-address=127.0.0.1",
        f"--object-store-memory={80 * 2**20}",
        f"--autoscaling-config={file}",
        "--include-dashboard=false",
    ]
    environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with open(folder / "cluster.txt", "wb") as out:
        head = subprocess.Popen(
            [*ray_command, *options], stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        end = time.monotonic() + 60
        while "--block" not in (folder / "cluster.txt").read_text() and time.monotonic() < end:
            assert head.poll() is None, (folder / "cluster.txt").read_text()
            time.sleep(0.5)
        yield address
    finally:
        mine = [
            process
            for process in psutil.process_iter()
            if address in " ".join(_words(process)) and process.pid != os.getpid()
        ]
        for process in {*mine, *psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)}:
            with contextlib.suppress(psutil.Error):
                process.kill()
        head.wait()


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []
