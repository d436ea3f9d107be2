"""The checks of `firstlight doctor --ray`: starts Ray or joins a cluster, and queries every node."""

import importlib.metadata
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firstlight.pipeline.cli.findings import PROBLEM, WARNING, Finding
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.data.mirror.places import TravellingPath, find_mirror
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.ray_session import RaySession

# Seconds that a node has to answer.
NODE_ANSWER_S = 60.0
COMPARED_PACKAGES = ("ray", "torch", "numpy", "pyarrow", "firstlight")


def check_nodes(recipe: Recipe | None, storage: Path) -> Iterator[Finding]:
    """Checks that Ray runs, and that every node answers, has the versions of this machine and sees the storage."""
    scale = recipe.scale if recipe else ScaleOptions(name="local")
    scale = scale if scale.max_workers else scale.model_copy(update={"workers": 1})
    local = scale.address == "local"
    started = time.monotonic()
    with RaySession(scale, recipe.stream if recipe else None) as session:
        try:
            session.start()
        except UserError as error:
            advice = "see above" if local else "start the cluster, or correct scale.address"
            yield Finding("ray", "start", str(error), PROBLEM, advice)
            return
        import ray

        action, total = "started" if local else f"joined {scale.address!r}", ray.cluster_resources()
        resources = f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        yield Finding("ray", "start", f"{action} in {time.monotonic() - started:.0f} s: {resources}")
        yield from _check_each_node(storage, not local)


def _check_each_node(storage: Path, cluster: bool) -> Iterator[Finding]:
    import ray

    probe, local_facts = storage / f".doctor-{uuid.uuid4().hex[:8]}", collect_node_facts(None)
    mirror = find_mirror(storage)
    storage.mkdir(parents=True, exist_ok=True)
    if mirror is None:
        probe.write_text("x")
    else:
        mirror.bucket.write(probe.name, b"x")
    try:
        for node in (node for node in ray.nodes() if node["Alive"]):
            yield _compare_node(node["NodeManagerAddress"], local_facts, _query_node(node["NodeID"], probe), cluster)
    finally:
        probe.unlink(missing_ok=True)
        if mirror is not None:
            mirror.bucket.delete([probe.name])


def _query_node(node_id: str, probe: Path) -> dict[str, Any] | None:
    """Returns the facts of a node, or None if it does not run a task within `NODE_ANSWER_S`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(collect_node_facts).options(num_cpus=0, scheduling_strategy=strategy)
    try:
        answer: dict[str, Any] = ray.get(task.remote(TravellingPath(probe)), timeout=NODE_ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return None
    return answer


def collect_node_facts(probe: TravellingPath | None) -> dict[str, Any]:
    """Returns this node's versions of Python and of `COMPARED_PACKAGES`; `seen` is true if it sees the file or the
    object `probe`.
    """
    versions = {}
    for name in COMPARED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {"python": platform.python_version(), "seen": probe is not None and _is_seen(probe.path), **versions}


def _is_seen(probe: Path) -> bool:
    mirror = find_mirror(probe)
    if mirror is None:
        return probe.exists()
    try:
        return mirror.bucket.read(probe.name) is not None
    except OSError:
        return False


def _compare_node(name: str, local: dict[str, Any], remote: dict[str, Any] | None, cluster: bool) -> Finding:
    """Returns the finding about one node; other versions are a problem in a cluster, and a warning on one machine."""
    subject = f"node {name}"
    if remote is None:
        observation = f"did not run a task within {NODE_ANSWER_S:.0f} s"
        return Finding("ray", subject, observation, PROBLEM, "read its logs below /tmp/ray")
    if not remote["seen"]:
        advice = "storage= must be a folder that all nodes share, or a bucket that all can read"
        return Finding("ray", subject, "does not see the storage", PROBLEM, advice)
    differing = [f"{k} {remote[k]} (here {local[k]})" for k in local if k != "seen" and remote[k] != local[k]]
    if differing:
        verdict = PROBLEM if cluster else WARNING
        return Finding("ray", subject, ", ".join(differing), verdict, "install the same versions on every node")
    return Finding("ray", subject, "runs tasks, has the same versions, sees the storage")
