"""The part of `firstlight doctor` that starts Ray, or joins a cluster, and asks every node."""

import importlib.metadata
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firstlight.pipeline.cli.doctor import PROBLEM, WARNING, Finding
from firstlight.pipeline.config.recipe import Recipe, Scale
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.ray_session import Session

ANSWER_S = 60.0  # that a node has to answer
COMPARED = ("ray", "torch", "numpy", "pyarrow", "firstlight")


def nodes(recipe: Recipe | None, storage: Path) -> Iterator[Finding]:
    """Ray is there, every node answers, has the versions of this one, and sees the storage."""
    scale = recipe.scale if recipe else Scale(name="local")
    scale = scale if scale.most else scale.model_copy(update={"workers": 1})
    started = time.monotonic()
    with Session(scale, recipe.stream if recipe else None) as session:
        try:
            session.start()
        except UserError as error:
            yield Finding(
                "ray",
                "start",
                str(error),
                PROBLEM,
                "start the cluster, or mend scale.address" if scale.address != "local" else "see above",
            )
            return
        import ray

        what = "started" if scale.address == "local" else f"joined {scale.address!r}"
        have = ray.cluster_resources()
        told = f"{what} in {time.monotonic() - started:.0f} s: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
        yield Finding("ray", "start", told)
        yield from _answers(storage, scale.address != "local")


def _answers(storage: Path, cluster: bool) -> Iterator[Finding]:
    import ray

    probe, mine = storage / f".doctor-{uuid.uuid4().hex[:8]}", facts("")
    storage.mkdir(parents=True, exist_ok=True)
    probe.write_text("x")
    try:
        for node in (node for node in ray.nodes() if node["Alive"]):
            yield _of_node(node["NodeManagerAddress"], mine, _ask(node["NodeID"], probe), cluster)
    finally:
        probe.unlink(missing_ok=True)


def _ask(node_id: str, probe: Path) -> dict[str, Any] | None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(facts).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
    try:
        answer: dict[str, Any] = ray.get(task.remote(str(probe)), timeout=ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return None
    return answer


def facts(probe: str) -> dict[str, Any]:
    """What a node has; `seen`: whether it sees the file."""
    versions = {}
    for name in COMPARED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {"python": platform.python_version(), "seen": bool(probe) and Path(probe).exists(), **versions}


def _of_node(name: str, mine: dict[str, Any], its: dict[str, Any] | None, cluster: bool) -> Finding:
    if its is None:
        return Finding(
            "ray",
            f"node {name}",
            f"did not run a task within {ANSWER_S:.0f} s",
            PROBLEM,
            "look at its logs below /tmp/ray",
        )
    apart = [f"{key} {its[key]} (here {mine[key]})" for key in mine if key != "seen" and its[key] != mine[key]]
    if not its["seen"]:
        return Finding(
            "ray", f"node {name}", "does not see the storage", PROBLEM, "storage= must be a folder that all nodes share"
        )
    if apart:
        return Finding(
            "ray",
            f"node {name}",
            ", ".join(apart),
            PROBLEM if cluster else WARNING,
            "install the same versions on every node",
        )
    return Finding("ray", f"node {name}", "runs tasks, has the same versions, sees the storage")
