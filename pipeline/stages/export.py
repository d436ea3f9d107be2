"""The stage `export`: an encoder or a whole fine-tuned model in the formats of other libraries.

Each is compared with the network on images before it counts.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.records import Count, FiniteNumber, HexDigest, RecordShape
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.artifacts.weights_origin import trace_weights
from firstlight.pipeline.stages.exporting.checks import build_made_task, check_formats
from firstlight.pipeline.stages.exporting.comparison import choose_comparison_images
from firstlight.pipeline.stages.exporting.encoder_exporter import EncoderExporter
from firstlight.pipeline.stages.exporting.format_folder import NetworkExporter, export_format
from firstlight.pipeline.stages.exporting.model_exporter import ModelExporter, explain_missing_saved_format
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.sections.export import Export
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind, StageOutput
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.folder_manifest import write_manifest
from firstlight.pipeline.train.metrics import PassProgress, append_row
from firstlight.tasks.downstream.model_formats import explain_missing_model_format
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import EXPORT_FORMATS, MAP_TOLERANCE, explain_missing_format

EXPORT_FOLDER = "export"


class _ExportedFile(RecordShape):
    """A file of a format."""

    bytes: Count
    sha256: HexDigest


class _DifferenceShape(RecordShape):
    """The largest difference from the encoder on a set of images."""

    images: Count
    absolute: FiniteNumber
    relative: FiniteNumber


class _FormatShape(RecordShape):
    """The facts of a format."""

    files: dict[str, _ExportedFile]
    difference: Annotated[dict[str, _DifferenceShape], Field(min_length=1)]


class _ExportShape(RecordShape):
    """The result of an export."""

    what: Literal["encoder", "model"] = "encoder"
    image_size: Count
    map: list[Count]
    formats: dict[str, _FormatShape]
    left_out: dict[str, str]
    tolerance: FiniteNumber


EXPORT_SHAPE = TypeAdapter(_ExportShape)


class ExportStage(StageKind[Export]):
    """The encoder in the formats of other libraries, each compared with it."""

    section = Export
    runs_on = "driver"

    def outputs(self, stage: Export, instance: StageInstance) -> list[StageOutput]:
        folder = instance.folder / EXPORT_FOLDER
        return [StageOutput(f"exported {stage.what}", folder, "card.md has the code that loads each format")]

    def run(self, context: StageContext, stage: Export, instance: StageInstance) -> None:
        """Writes `export/<format>/` and `result.json` into the instance's folder.

        Raises:
            StageFailed: a format gives other values than the network, or cannot be written. No file of it is left.
        """
        exporter, folder = open_exporter(context, stage, instance), instance.folder / EXPORT_FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        reasons = {format: exporter.explain_missing(format) for format in stage.formats or EXPORT_FORMATS}
        for format, reason in reasons.items():
            if reason:
                append_row(instance.folder, {"note": f"{format} is left out: {reason}"})
        wanted = [format for format, reason in reasons.items() if not reason]
        tests = choose_comparison_images(context)
        compared = sum(map(len, tests.values()))
        progress = PassProgress(instance.folder, len(wanted) * compared)
        formats = {}
        for format in wanted:
            formats[format] = export_format(exporter, format, folder, tests)
            if reason := formats[format].get("not_by_name"):
                append_row(instance.folder, {"note": f"{format}: timm.create_model cannot load it by name: {reason}"})
            progress.add_images(compared)
        write_manifest(folder, {f"{k}/{name}": entry for k, v in formats.items() for name, entry in v["files"].items()})
        left_out = {format: reason for format, reason in reasons.items() if reason}
        size, shape = exporter.encoder.image_size, exporter.encoder.shapes[-1]
        about = {"what": stage.what, "image_size": size, "map": shape}
        instance.write_result({**about, "formats": formats, "left_out": left_out, "tolerance": MAP_TOLERANCE})

    def list_deciding_facts(self, stage: Export, recipe: Recipe) -> dict[str, Any]:
        # It is written into the files.
        return {"licence": recipe.encoder.licence} if recipe.encoder and recipe.encoder.licence else {}

    def result_shape(self, stage: Export) -> TypeAdapter[Any]:
        return EXPORT_SHAPE

    def check_encoder(self, name: str, stage: Export, recipe: Recipe, encoder: Encoder) -> None:
        if stage.what == "encoder":
            check_formats(f"stages.{name}", stage, lambda format: explain_missing_format(encoder, format))

    def check_source(self, name: str, stage: Export, context: RecipeContext) -> None:
        source = context.recipe.encoder_source(name)
        if stage.what == "model" and source is not None and source.stage is not None and stage.formats:
            task, is_padded = build_made_task(context, context.recipe.stages[source.stage])
            check_formats(f"stages.{name}", stage, lambda format: explain_missing_model_format(task, format, is_padded))

    def check_reference(self, name: str, stage: Export, recipe: Recipe, folder: Path) -> None:
        if stage.what == "model":
            check_formats(f"stages.{name}", stage, partial(explain_missing_saved_format, read_model(folder)))


def open_exporter(context: StageContext, stage: Export, instance: StageInstance) -> NetworkExporter:
    """Returns the exporter of the encoder, or of the whole model, that an instance of the stage writes."""
    assert instance.encoder is not None
    origin = trace_weights(context.recipe, instance.stage, instance.encoder)
    if stage.what == "model":
        return ModelExporter(read_model(instance.encoder), instance, origin)
    return EncoderExporter(load_encoder(instance.encoder, context.recipe.dataset.image_size).eval(), instance, origin)
