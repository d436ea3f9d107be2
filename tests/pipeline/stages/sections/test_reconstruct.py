"""The section of reconstructions."""

import pytest
from pydantic import ValidationError

from firstlight.pipeline.stages.sections.reconstruct import Reconstruct


def test_ratio_is_of_the_named_images() -> None:
    (measure,) = Reconstruct(kind="reconstruct", images="val").measures
    assert (measure.name, measure.label, measure.scale) == ("psnr", "PSNR (dB), held-out images", 1.0)
    assert Reconstruct(kind="reconstruct").measured_splits == {"test"}


@pytest.mark.parametrize("keys", [{"sigma": (50.0, 10.0)}, {"sigma": (-1.0, 10.0)}, {"corruption": "none"}])
def test_wrong_corruptions_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=str(next(iter(keys)))):
        Reconstruct.model_validate({"kind": "reconstruct", **keys})
