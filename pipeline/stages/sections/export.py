"""The section of a stage that writes networks for other software."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from firstlight.pipeline.config.schema import check_distinct
from firstlight.pipeline.config.stages import DownstreamStage


class Export(DownstreamStage):
    """Writes the encoder, or a whole fine-tuned model, for other software: state dicts of torchvision and timm,
    safetensors, ONNX, torch.export.
    """

    kind: Literal["export"] = Field(description="The kind of the stage; by default the name of the stage.")
    what: Literal["encoder", "model"] = Field(
        "encoder",
        description="What is written. `model`: a whole fine-tuned model, which gives logits; `encoder: previous` is "
        "then the model of the last finetune stage before this one, and `runs:/<run>/model` or a registered one can be "
        "named. Not all formats exist of every task.",
    )
    formats: tuple[Literal["torchvision", "timm", "safetensors", "onnx", "torch_export"], ...] | None = Field(
        None,
        min_length=1,
        description="The formats that are written, with a model card. null: all formats that the encoder has.",
    )

    encoder_use: ClassVar[str] = "in other software"
    command_help: ClassVar[str] = (
        "Run the export stages: an encoder or a fine-tuned model.\n\n"
        "The formats are torchvision, timm, safetensors, ONNX and torch.export; a model card is written too."
    )
    recipe_comment: ClassVar[str] = "The network for other software, with a model card."

    @property
    def has_plain_crops(self) -> bool:
        return True

    @property
    def takes_model(self) -> bool:
        return self.what == "model"

    @field_validator("formats")
    @classmethod
    def _check_distinct(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return formats and check_distinct(formats, "a name")
