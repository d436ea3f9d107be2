"""Checks of recipes that build each network once, and not for each recipe that has it: that is most of their time."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from firstlight.pipeline.run import preflight
from firstlight.tasks.nn.encoders import Encoder


@contextmanager
def build_networks_once() -> Iterator[None]:
    """Gives the checks of recipes the same network again for the same spec and size, until the block ends.

    Stages look at what the checks have built, and change nothing of it.
    """
    built: dict[str, Encoder] = {}

    def build_or_recall(spec: Mapping[str, Any], image_size: int) -> Encoder:
        key = json.dumps([dict(spec), image_size], sort_keys=True)
        if key not in built:
            built[key] = Encoder(spec, image_size)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "Encoder", build_or_recall)
        yield
