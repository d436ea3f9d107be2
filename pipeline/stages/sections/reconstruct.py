"""The section of a stage that reconstructs corrupted images."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from firstlight.pipeline.config.measures import SHOWN_IMAGES, Measure
from firstlight.pipeline.config.stages import DownstreamStage
from firstlight.tasks.nn import CorruptionKind, Sigma


class Reconstruct(DownstreamStage):
    """Corrupts images and reconstructs them with a pretrained encoder and its decoder: figures, and the peak
    signal-to-noise ratio.
    """

    kind: Literal["reconstruct"] = Field(description="The kind of the stage; by default the name of the stage.")
    images: Literal["val", "test"] = Field("test", description="The images: held-out or test images.")
    corruption: CorruptionKind = Field(
        "pixel_gaussian", description="The corruption of the images, one of those of the method `dae`."
    )
    sigma: tuple[Sigma, Sigma] = Field(
        (10.0, 50.0),
        description="The bounds of the noise level of an image, in 0..255, for `pixel_gaussian` and `patch_gaussian`.",
    )
    patch: int = Field(4, ge=1, description="The side in pixels of the squares of `patch_gaussian`.")
    blocks: int = Field(21, ge=1, description="The number of `small_blocks`.")
    shown_map: int | None = Field(
        None,
        ge=1,
        description="The number, from 1, of the encoder's map whose channels are shown in figures. null: the deepest "
        "map with a side of at least 8.",
    )
    batch_size: int = Field(64, ge=1, description="The number of images that are reconstructed at a time.")

    command_help: ClassVar[str] = "Run the reconstruction stages: corrupted images and their PSNR."
    values_without_test: ClassVar[Mapping[str, str]] = {"images": "val"}

    @property
    def has_plain_crops(self) -> bool:
        return True

    @field_validator("sigma")
    @classmethod
    def _check_sigma(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        if sigma[0] > sigma[1]:
            raise ValueError("the lower bound comes first")
        return sigma

    @property
    def companions(self) -> tuple[str, ...]:
        return ("decoder",)

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (Measure("psnr", f"PSNR (dB), {SHOWN_IMAGES[self.images]}", scale=1.0),)

    @property
    def measured_splits(self) -> frozenset[str]:
        return frozenset((self.images,))
