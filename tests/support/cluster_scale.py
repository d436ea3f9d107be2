"""Changes of the small recipe for a cluster."""

from typing import Any


def scale(address: str, workers: Any, **more: Any) -> dict[str, Any]:
    found = {"address": address, "workers": workers, "cpus_per_worker": 1.5, "collective_timeout_s": 40, **more}
    return {f"scale__{key}": value for key, value in found.items()} | {"stream__resident": "off", "stream__tasks": 1}
