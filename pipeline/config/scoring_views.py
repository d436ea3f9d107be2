"""The views of held-out and test images that a downstream task is scored by."""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from firstlight.pipeline.config.schema import Augment, build_ten_crops, build_windows
from firstlight.pipeline.config.schemas.strict_model import StrictModel


class ScoringViews(StrictModel):
    """The crops of a held-out or test image, and the pixels that a task on masks is scored by."""

    test_crops: Literal[1, 10] = Field(
        1, description="The number of crops of a test image whose predictions are averaged. 1: `dataset.eval_augment`."
    )
    test_crop: Literal["corners", "random"] = Field(
        "corners",
        description="The ten crops: `corners` are the four corners, the centre and their mirror images; `random` crops "
        "are drawn by the augmentations of the training.",
    )
    test_scale: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="The side of a `corners` crop, or of a window of `scored_pixels: image`, as a fraction of the "
        "image's shorter side. null: 0.875, or what `test_size` says.",
    )
    test_size: int | None = Field(
        None, ge=1, description="The same side in pixels of the image, as `size` of the augmentation `corner_crop`."
    )
    scored_pixels: Literal["view", "image"] = Field(
        "view",
        description="The pixels of a mask that are scored. `view`: those of the view of `dataset.eval_augment`. "
        "`image`: all labelled pixels of the image, at its own size. Square windows cover it, as few as that takes, "
        "and their answers are scaled to its pixels and averaged where windows overlap.",
    )

    @model_validator(mode="after")
    def _check_crops(self) -> "ScoringViews":
        if self.test_crop == "random" and self.test_crops == 1:
            raise ValueError("test_crop: 'random' is not valid with test_crops: 1; valid: corners, or test_crops: 10")
        if self.test_scale is not None and self.test_size is not None:
            raise ValueError(
                f"test_scale: {self.test_scale} and test_size: {self.test_size} are both given; valid: one of them"
            )
        return self

    def build_corner_crops(self) -> list[Augment]:
        """Returns the augmentations of the ten crops `corners`."""
        return build_ten_crops(self.test_scale, self.test_size)

    def build_covering_windows(self, sizes: np.ndarray) -> list[Augment]:
        """Returns the augmentations of the windows that cover images of (n, 2) widths and heights."""
        return build_windows(sizes, self.test_scale, self.test_size)
