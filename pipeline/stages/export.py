"""The stage `export`: the encoder in the formats of other libraries. Each is compared with the encoder on images before
it counts.
"""

import contextlib
import importlib.metadata
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, field_validator
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import check_distinct
from firstlight.pipeline.config.stages import DownstreamStage
from firstlight.pipeline.data.manifest import file_sha256
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.files import write_flushed
from firstlight.pipeline.records import Count, FiniteNumber, HexDigest, RecordShape
from firstlight.pipeline.stages.artifacts import load_encoder, read_encoder_description, save_encoder
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import StageKind, StageOutput
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import PassProgress, append_row
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import (
    EXPORT_FORMATS,
    MAP_TOLERANCE,
    Counterpart,
    ExportGraph,
    explain_missing_format,
    export_program,
    find_counterpart,
    measure_difference,
)

EXPORT_FOLDER = "export"
ONNX_OPSET = 18  # that torch's exporter writes; others are converted from it
NUM_REAL_IMAGES, RANDOM_BATCH_SIZES = (
    8,
    (1, 5),
)  # images that are compared: of the store, and in random batches of two sizes
NetworkAnswer = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # (B, 3, S, S) in 0..1 -> (B, C) features, (B, C, h, w) last map


class Export(DownstreamStage):
    """Writes the encoder for other software: state dicts of torchvision and timm, safetensors, ONNX, torch.export."""

    kind: Literal["export"] = Field(description="The kind of the stage; by default the name of the stage.")
    formats: tuple[Literal["torchvision", "timm", "safetensors", "onnx", "torch_export"], ...] | None = Field(
        None,
        min_length=1,
        description="The formats that are written, with a model card. null: all formats that the encoder has.",
    )

    @field_validator("formats")
    @classmethod
    def _check_distinct(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return formats and check_distinct(formats, "a name")


def _export_format(maker: "_Exporter", format: str, folder: Path, tests: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a format, compares it with the encoder, and only then moves it to its final folder. Returns its facts for
    the result.
    """
    part = folder / f".{format}"
    part.mkdir(parents=True)
    try:
        with _silence_exporters():
            answer, facts = getattr(maker, format)(part)
            differences = compare_answers(maker.graph, answer, tests)
    except Exception as error:  # the exporters of others fail in ways of their own
        shutil.rmtree(folder)
        raise StageFailed(f"{maker.instance.label}: {format} cannot be exported: {_error_line(error)}") from error
    worst = max(found["relative"] for found in differences.values())
    if not worst <= MAP_TOLERANCE:
        shutil.rmtree(folder)
        raise StageFailed(
            f"{maker.instance.label}: {format} differs from the encoder by {worst:.2g} of its largest value; at most "
            f"{MAP_TOLERANCE:g} is rounding"
        )
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(part.iterdir())}
    part.rename(folder / format)
    return {"files": files, "difference": differences, **facts}


@torch.no_grad()
def compare_answers(graph: ExportGraph, answer: NetworkAnswer, tests: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Returns the largest absolute and relative differences of features and map, by set of images."""
    out = {}
    for name, images in tests.items():
        pairs = [measure_difference(own, other) for own, other in zip(graph(images), answer(images), strict=True)]
        out[name] = {"images": len(images), "absolute": max(a for a, _ in pairs), "relative": max(r for _, r in pairs)}
    return out


def _comparison_images(context: StageContext) -> dict[str, Tensor]:
    """(B, 3, S, S) images in 0..1: held-out ones, training ones where none is held out, and random batches of two
    sizes.
    """
    ids = next(ids for ids in (context.splits.val, context.splits.test, context.splits.train) if len(ids))[
        :NUM_REAL_IMAGES
    ]
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0)
    real = to_batch(loader.load_once(ids), torch.device("cpu")).views[0]
    generator, size = torch.Generator().manual_seed(0), real.shape[-1]
    return {
        "store": real,
        **{f"random {n}": torch.rand(n, 3, size, size, generator=generator) for n in RANDOM_BATCH_SIZES},
    }


@dataclass(frozen=True)
class _Exporter:
    """Writes the encoder in each format. Every method, named as its format, takes a folder and returns the network as
    others load it, and facts about it.
    """

    encoder: Encoder
    instance: StageInstance

    @cached_property
    def graph(self) -> ExportGraph:
        return ExportGraph(self.encoder).eval()

    @cached_property
    def program(self) -> Any:
        return export_program(self.encoder)

    def torchvision(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_counterpart(self.encoder, "torchvision"))

    def timm(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_counterpart(self.encoder, "timm"))

    def _state_dict(self, folder: Path, found: Counterpart) -> tuple[NetworkAnswer, dict[str, Any]]:
        data = save_tensors(
            found.library_state(self.encoder), {"format": "pt", "model": found.model, "library": found.library}
        )
        write_flushed(folder / "model.safetensors", data)
        net, missing = found.build_network(_load_tensors(folder / "model.safetensors"))
        last_map = found.last_map(net)

        def answer(images: Tensor) -> tuple[Tensor, Tensor]:
            map_ = last_map(self.encoder.input(images))
            return map_.mean((2, 3)), map_

        version = importlib.metadata.version(found.library)
        return answer, {
            "model": found.model,
            "place": found.source,
            "turned": found.channels_last,
            "missing": missing,
            "version": version,
        }

    def safetensors(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        assert self.instance.encoder is not None
        save_encoder(self.encoder, folder, read_encoder_origin(self.instance.encoder))
        return ExportGraph(load_encoder(folder, self.encoder.image_size)).eval(), {}

    def torch_export(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        """Writes a torch.export program. It is compared before it is written, because reading it back unpickles."""
        written = io.BytesIO()
        torch.export.save(self.program, written)
        write_flushed(folder / "encoder.pt2", written.getvalue())
        return self.program.module(), {"version": torch.__version__}

    def onnx(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        import onnxruntime

        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["features", "map"]}
        program = torch.onnx.export(self.program, (), opset_version=ONNX_OPSET, verbose=False, **names)
        assert program is not None
        program.save(folder / "encoder.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / "encoder.onnx", options, providers=["CPUExecutionProvider"])

        def answer(images: Tensor) -> tuple[Tensor, Tensor]:
            features, map_ = session.run(["features", "map"], {"images": images.numpy()})
            return torch.from_numpy(features), torch.from_numpy(map_)

        return answer, {"opset": ONNX_OPSET, "version": onnxruntime.__version__}


def read_encoder_origin(folder: Path) -> dict[str, Any]:
    """Returns how a saved encoder was made: its method, or the task and the start of a fine-tuning; store and seed."""
    description = read_encoder_description(folder)
    return {key: description[key] for key in ("method", "task", "arm", "store", "seed") if key in description}


def _load_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(file.read_bytes())


@contextlib.contextmanager
def _silence_exporters() -> Iterator[None]:
    """Silences the messages of torch's exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _error_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


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
        return [StageOutput("exported encoder", folder, "card.md has the code that loads each format")]

    def run(self, context: StageContext, stage: Export, instance: StageInstance) -> None:
        """Writes `export/<format>/` and `result.json` into the instance's folder.

        Raises:
            StageFailed: a format gives other values than the encoder, or cannot be written. No file of it is left.
        """
        assert instance.encoder is not None
        encoder = load_encoder(instance.encoder, context.recipe.dataset.image_size).eval()
        maker, folder = _Exporter(encoder, instance), instance.folder / EXPORT_FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        reasons = {format: explain_missing_format(encoder, format) for format in stage.formats or EXPORT_FORMATS}
        for format, reason in reasons.items():
            if reason:
                append_row(instance.folder, {"note": f"{instance.label}: {format} is left out: {reason}"})
        wanted = [format for format, reason in reasons.items() if not reason]
        tests = _comparison_images(context)
        compared = sum(map(len, tests.values()))
        progress = PassProgress(instance.folder, len(wanted) * compared)
        formats = {}
        for format in wanted:
            formats[format] = _export_format(maker, format, folder, tests)
            progress.add_images(compared)
        left_out = {format: reason for format, reason in reasons.items() if reason}
        size, shape = encoder.image_size, encoder.shapes[-1]
        instance.write_result(
            {"image_size": size, "map": shape, "formats": formats, "left_out": left_out, "tolerance": MAP_TOLERANCE}
        )

    def result_shape(self, stage: Export) -> TypeAdapter[Any]:
        return EXPORT_SHAPE

    def check_encoder(self, name: str, stage: Export, recipe: Recipe, encoder: Encoder) -> None:
        _check_formats(f"stages.{name}", stage, encoder)


def _check_formats(where: str, stage: Export, encoder: Encoder) -> None:
    """Checks that the formats that a recipe names exist for this encoder."""
    reasons = {format: explain_missing_format(encoder, format) for format in stage.formats or ()}
    for format, reason in reasons.items():
        if reason:
            valid = [
                name
                for name in EXPORT_FORMATS
                if not (reasons[name] if name in reasons else explain_missing_format(encoder, name))
            ]
            raise UserError(f"{where}.formats: {format!r} is not valid: {reason}; valid: {', '.join(valid)}")
