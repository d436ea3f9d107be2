"""Workers are placed on machines one by one."""

import json
from typing import Any

import pytest

from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.nodes import Node, check_worker_fit


@pytest.mark.parametrize(
    ("fields", "nodes", "fit"),
    [
        ({"workers": 2, "cpus_per_worker": 1.5}, [(2, 0)] * 2, True),
        ({"workers": 2, "cpus_per_worker": 1.5}, [(3, 0)], True),
        ({"workers": 2, "cpus_per_worker": 1.5}, [(2, 0), (1, 0)], False),
        ({"workers": [1, 2], "cpus_per_worker": 1.5}, [(2, 0), (1, 0)], True),
        ({"workers": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 1.0}, [(16, 1), (16, 0)], False),
        ({"workers": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 0.5}, [(16, 1), (16, 0)], True),
    ],
)
def test_each_worker_must_fit_on_one_machine(
    fields: dict[str, Any], nodes: list[tuple[float, float]], fit: bool
) -> None:
    found = ScaleOptions.model_validate_json(json.dumps({"name": "test", **fields}))
    there = [Node(*node) for node in nodes]
    if fit:
        check_worker_fit(found, there, "the cluster")
    else:
        with pytest.raises(
            UserError,
            match=r"^scale\.workers: 2 workers x .* do not fit on the machines one by one: the cluster has machines of",
        ):
            check_worker_fit(found, there, "the cluster")
