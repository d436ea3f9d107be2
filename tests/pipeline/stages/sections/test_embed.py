"""The section of embeddings."""

import pytest
from pydantic import ValidationError

from firstlight.pipeline.stages.sections.embed import Embed


def test_splits_are_measured_unless_all_images_are_embedded() -> None:
    assert Embed(kind="embed").measured_splits == frozenset()
    assert Embed(kind="embed", splits=("val",)).measured_splits == {"val"}


@pytest.mark.parametrize("key", ["splits", "map_classes"])
def test_no_name_occurs_twice(key: str) -> None:
    with pytest.raises(ValidationError, match="must not repeat a name"):
        Embed.model_validate({"kind": "embed", key: ("val", "val")})
