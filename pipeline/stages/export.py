"""The stage `export`: an encoder or a whole fine-tuned model in the formats of other libraries.

Each is compared with the network on images before it counts.
"""

import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, field_validator
from safetensors.torch import save as save_tensors
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import check_distinct, constructor_arguments
from firstlight.pipeline.config.stages import DownstreamStage
from firstlight.pipeline.data.manifest import file_sha256
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.files import write_flushed
from firstlight.pipeline.records import Count, FiniteNumber, HexDigest, RecordShape
from firstlight.pipeline.stages.artifacts import (
    WEIGHTS_ORIGIN_KEY,
    load_encoder,
    read_encoder_description,
    save_encoder,
    trace_weights,
)
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FILES, SavedModel, read_model
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind, StageOutput
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST, write_manifest
from firstlight.pipeline.train.metrics import PassProgress, append_row
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.model_formats import (
    ClassifierCounterpart,
    ModelGraph,
    explain_missing_model_format,
    export_model_program,
    find_classifier,
)
from firstlight.tasks.downstream.starting_weights import fold_encoder
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.downstream.whole_images import ImageViews
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
from firstlight.tasks.nn.timm_folder import TimmFolder, describe_for_timm, write_timm_config

EXPORT_FOLDER = "export"
# The facts of a saved encoder that say how it was made, and their types.
ORIGIN_FACTS: dict[str, type] = {"method": dict, "task": dict, "arm": str, "store": str, "seed": int}
ONNX_OPSET = 18  # that torch's exporter writes; others are converted from it
NUM_REAL_IMAGES, RANDOM_BATCH_SIZES = (
    8,
    (1, 5),
)  # images that are compared: of the store, and in random batches of two sizes
# (B, 3, S, S) in 0..1 -> the outputs: (B, C) features and (B, C, h, w) last map of an encoder, logits of a model
NetworkAnswer = Callable[[Tensor], tuple[Tensor, ...]]


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

    @property
    def takes_model(self) -> bool:
        return self.what == "model"

    @field_validator("formats")
    @classmethod
    def _check_distinct(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return formats and check_distinct(formats, "a name")


def _export_format(
    maker: "_Exporter | _ModelExporter", format: str, folder: Path, tests: dict[str, Tensor]
) -> dict[str, Any]:
    """Writes a format, compares it with the encoder, and only then moves it to its final folder. Returns its facts for
    the result.
    """
    part = folder / f".{format}"
    part.mkdir(parents=True)
    try:
        with _silence_exporters():
            answer, facts = getattr(maker, format)(part)
            differences = compare_answers(maker.answer_images, answer, tests)
    except Exception as error:  # the exporters of others fail in ways of their own
        shutil.rmtree(folder)
        raise StageFailed(f"{maker.instance.label}: {format} cannot be exported: {_error_line(error)}") from error
    worst = max(found["relative"] for found in differences.values())
    if not worst <= MAP_TOLERANCE:
        shutil.rmtree(folder)
        raise StageFailed(
            f"{maker.instance.label}: {format} differs from the {maker.what} by {worst:.2g} of its largest value; at "
            f"most {MAP_TOLERANCE:g} is rounding"
        )
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(part.iterdir())}
    part.rename(folder / format)
    return {"files": files, "difference": differences, **facts}


@torch.no_grad()
def compare_answers(
    own_answer: NetworkAnswer, answer: NetworkAnswer, tests: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Returns the largest absolute and relative differences of the outputs of two networks, by set of images."""
    out = {}
    for name, images in tests.items():
        outputs = zip(own_answer(images), answer(images), strict=True)
        pairs = [measure_difference(own, other) for own, other in outputs]
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
    # What is known of the existing weights that it comes from.
    origin: Mapping[str, str]
    what = "encoder"

    def answer_images(self, images: Tensor) -> tuple[Tensor, ...]:
        features, map_ = ExportGraph(self.encoder).eval()(images)
        return features, map_

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
        last_map, facts = found.last_map(net), dict[str, Any]()
        if found.library == "timm":
            content = describe_for_timm(self.encoder, found.model, found.options, licence=self.origin.get("licence"))
            named, facts = _load_by_name(folder, self.encoder, content, partial(_has_last_map, self.encoder, found))
            # The network as others load it is the one that is compared.
            last_map = _choose_last_map(found, named) if named else last_map

        def answer(images: Tensor) -> tuple[Tensor, Tensor]:
            map_ = last_map(self.encoder.input(images))
            return map_.mean((2, 3)), map_

        version = importlib.metadata.version(found.library)
        return answer, {
            "model": found.model,
            "options": dict(found.options),
            "place": found.source,
            "turned": found.channels_last,
            "missing": missing,
            "version": version,
            **facts,
        }

    def safetensors(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        assert self.instance.encoder is not None
        origin = {WEIGHTS_ORIGIN_KEY: self.origin} if self.origin else {}
        save_encoder(self.encoder, folder, {**read_encoder_origin(self.instance.encoder), **origin})
        return ExportGraph(load_encoder(folder, self.encoder.image_size)).eval(), {}

    def torch_export(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        """Writes a torch.export program. It is compared before it is written, because reading it back unpickles."""
        written = io.BytesIO()
        torch.export.save(self.program, written)
        write_flushed(folder / "encoder.pt2", written.getvalue())
        return self.program.module(), {"version": torch.__version__}

    def onnx(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return _write_onnx(self.program, folder / "encoder.onnx", ["features", "map"], {})


def _load_by_name(
    folder: Path, encoder: Encoder, content: Mapping[str, Any], is_right: Callable[[TimmFolder], bool]
) -> tuple[TimmFolder | None, dict[str, Any]]:
    """Writes timm's `config.json` into a folder. Returns the folder as timm loads it by its name, and facts about that.

    They are None and the reason if timm cannot.
    """
    if encoder.input.normalize != "dataset":
        return None, {"not_by_name": "encoder.normalize: image is no mean and standard deviation of all images"}
    try:
        named = write_timm_config(folder, content, is_right)
    except ValueError as error:
        return None, {"not_by_name": str(error)}
    return named, {"gives_maps": named.gives_maps, "channels_last": named.is_channels_last}


def _choose_last_map(found: Counterpart, named: TimmFolder) -> Callable[[Tensor], Tensor]:
    return named.last_map if named.gives_maps else found.last_map(named.network)


@torch.no_grad()
def _has_last_map(encoder: Encoder, found: Counterpart, named: TimmFolder) -> bool:
    """Returns True if a loaded folder gives the last map of an encoder, of an image of noise."""
    size = encoder.image_size
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    own, there = encoder(images)[-1], _choose_last_map(found, named)(encoder.input(images))
    return there.shape == own.shape and measure_difference(own, there)[1] <= MAP_TOLERANCE


def _write_onnx(
    program: Any, file: Path, outputs: list[str], facts: Mapping[str, str]
) -> tuple[NetworkAnswer, dict[str, Any]]:
    """Writes an exported program as ONNX, with `facts` as the file's metadata. Returns it as onnxruntime runs it."""
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": outputs}
    written = torch.onnx.export(program, (), opset_version=ONNX_OPSET, verbose=False, **names)
    assert written is not None
    written.model.metadata_props.update(facts)
    written.save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(found) for found in session.run(outputs, {"images": images.numpy()}))

    return answer, {"opset": ONNX_OPSET, "version": onnxruntime.__version__}


@dataclass(frozen=True)
class _ModelExporter:
    """Writes a fine-tuned model in each format, as `_Exporter` does with an encoder."""

    model: SavedModel
    instance: StageInstance
    origin: Mapping[str, str]
    what = "model"

    @property
    def encoder(self) -> Encoder:
        return self.model.task.encoder

    def answer_images(self, images: Tensor) -> tuple[Tensor, ...]:
        return _answer_with_model(self.model.task, images)

    @cached_property
    def program(self) -> Any:
        return export_model_program(self.model.task)

    def torchvision(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_classifier(self.model.task, "torchvision"))

    def timm(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return self._state_dict(folder, find_classifier(self.model.task, "timm"))

    def _state_dict(self, folder: Path, found: ClassifierCounterpart) -> tuple[NetworkAnswer, dict[str, Any]]:
        library, network = found.encoder.library, found.encoder.model
        facts = {"format": "pt", "model": network, "library": library, "classes": json.dumps(self.model.classes)}
        write_flushed(folder / "model.safetensors", save_tensors(found.library_state(self.model.task), facts))
        net = found.build_network(_load_tensors(folder / "model.safetensors"))
        named, by_name = None, dict[str, Any]()
        if library == "timm":
            content = describe_for_timm(
                self.encoder, network, found.encoder.options, self.model.classes, self.origin.get("licence")
            )
            named, by_name = _load_by_name(folder, self.encoder, content, lambda _: True)
        network_there = named.network if named else net
        about = {"model": network, "options": dict(found.encoder.options), "classes": found.classes}
        about |= {"head": found.head_name, "version": importlib.metadata.version(library), **by_name}
        return lambda images: (network_there(self.encoder.input(images)),), about

    def safetensors(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        assert self.instance.encoder is not None
        for name in (*MODEL_FILES, FOLDER_MANIFEST):
            write_flushed(folder / name, (self.instance.encoder / name).read_bytes())
        task = read_model(folder).task
        return lambda images: _answer_with_model(task, images), {}

    def torch_export(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        """Writes a torch.export program. It is compared before it is written, because reading it back unpickles."""
        written = io.BytesIO()
        torch.export.save(self.program, written)
        write_flushed(folder / "model.pt2", written.getvalue())
        network = self.program.module()
        return lambda images: (network(images),), {"version": torch.__version__}

    def onnx(self, folder: Path) -> tuple[NetworkAnswer, dict[str, Any]]:
        return _write_onnx(self.program, folder / "model.onnx", ["logits"], describe_graph(self.model))


def describe_graph(model: SavedModel) -> dict[str, str]:
    """Returns the metadata of an exported graph: all that someone needs besides the graph to predict with it."""
    return {
        "task": str(model.spec["name"]),
        "classes": json.dumps(model.classes),
        "image_size": str(model.preprocessing.image_size),
        "views": json.dumps(model.preprocessing.views),
        "input": "images: float32 (B, 3, image_size, image_size), RGB in 0..1; the graph normalises them",
    }


def _answer_with_model(task: Task, images: Tensor) -> tuple[Tensor, ...]:
    """Returns the outputs of a model for images: logits, or the boxes and scores of all objects."""
    if task.target != "boxes":
        return (ModelGraph(task.eval())(images),)
    size = images.shape[-1]
    whole, plain = torch.tensor([[0.0, 0.0, size, size]]), torch.eye(2, 3, dtype=torch.float64)
    found = task.eval().predict_images([ImageViews(one[None], whole, plain[None], (size, size)) for one in images])
    return torch.cat([seen["boxes"] for seen in found]), torch.cat([seen["scores"] for seen in found])


def read_encoder_origin(folder: Path) -> dict[str, Any]:
    """Returns how a saved encoder was made: its method, or the task and the start of a fine-tuning; store and seed."""
    description = read_encoder_description(folder)
    return {key: description[key] for key, kind in ORIGIN_FACTS.items() if isinstance(description.get(key), kind)}


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
        maker, folder = _open_exporter(context, stage, instance), instance.folder / EXPORT_FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        reasons = {format: explain_format(maker, format) for format in stage.formats or EXPORT_FORMATS}
        for format, reason in reasons.items():
            if reason:
                append_row(instance.folder, {"note": f"{format} is left out: {reason}"})
        wanted = [format for format, reason in reasons.items() if not reason]
        tests = _comparison_images(context)
        compared = sum(map(len, tests.values()))
        progress = PassProgress(instance.folder, len(wanted) * compared)
        formats = {}
        for format in wanted:
            formats[format] = _export_format(maker, format, folder, tests)
            if reason := formats[format].get("not_by_name"):
                append_row(instance.folder, {"note": f"{format}: timm.create_model cannot load it by name: {reason}"})
            progress.add_images(compared)
        write_manifest(folder, {f"{k}/{name}": entry for k, v in formats.items() for name, entry in v["files"].items()})
        left_out = {format: reason for format, reason in reasons.items() if reason}
        size, shape = maker.encoder.image_size, maker.encoder.shapes[-1]
        about = {"what": stage.what, "image_size": size, "map": shape}
        instance.write_result({**about, "formats": formats, "left_out": left_out, "tolerance": MAP_TOLERANCE})

    def list_deciding_facts(self, stage: Export, recipe: Recipe) -> dict[str, Any]:
        # It is written into the files.
        return {"licence": recipe.encoder.licence} if recipe.encoder and recipe.encoder.licence else {}

    def result_shape(self, stage: Export) -> TypeAdapter[Any]:
        return EXPORT_SHAPE

    def check_encoder(self, name: str, stage: Export, recipe: Recipe, encoder: Encoder) -> None:
        if stage.what == "encoder":
            _check_formats(f"stages.{name}", stage, lambda format: explain_missing_format(encoder, format))

    def check_source(self, name: str, stage: Export, context: RecipeContext) -> None:
        source = context.recipe.encoder_source(name)
        if stage.what == "model" and source is not None and source.stage is not None and stage.formats:
            task, is_padded = _build_made_task(context, context.recipe.stages[source.stage])
            _check_formats(
                f"stages.{name}", stage, lambda format: explain_missing_model_format(task, format, is_padded)
            )

    def check_reference(self, name: str, stage: Export, recipe: Recipe, folder: Path) -> None:
        if stage.what == "model":
            model = read_model(folder)
            is_padded = _has_padding(model.preprocessing.views)
            explain = partial(explain_missing_model_format, model.task, is_padded=is_padded)
            _check_formats(f"stages.{name}", stage, explain)


def _open_exporter(context: StageContext, stage: Export, instance: StageInstance) -> "_Exporter | _ModelExporter":
    assert instance.encoder is not None
    origin = trace_weights(context.recipe, instance.stage, instance.encoder)
    if stage.what == "model":
        return _ModelExporter(read_model(instance.encoder), instance, origin)
    return _Exporter(load_encoder(instance.encoder, context.recipe.dataset.image_size).eval(), instance, origin)


def explain_format(maker: "_Exporter | _ModelExporter", format: str) -> str | None:
    """Returns the reason why an encoder or a model cannot be exported in a format; None if it can."""
    if isinstance(maker, _Exporter):
        return explain_missing_format(maker.encoder, format)
    return explain_missing_model_format(maker.model.task, format, _has_padding(maker.model.preprocessing.views))


def _has_padding(views: Iterable[Iterable[Mapping[str, Any]]]) -> bool:
    return any(op["op"] == "fit" for ops in views for op in ops)


def _build_made_task(context: RecipeContext, made: Any) -> tuple[Task, bool]:
    """Returns the task that a stage `made` of the recipe will train, and True if its views have padding."""
    encoder = copy.deepcopy(context.encoder)
    if made.batch_norm == "fold":
        fold_encoder(encoder)
    task = TASKS[made.task.name](encoder, len(context.source.classes), **constructor_arguments(made.task))
    return task, any(op.op == "fit" for op in context.recipe.dataset.eval_augment)


def _check_formats(where: str, stage: Export, explain: Callable[[str], str | None]) -> None:
    """Checks that the formats that a recipe names exist. `explain`: gives the reason why one does not."""
    reasons = {format: explain(format) for format in stage.formats or ()}
    for format, reason in reasons.items():
        if reason:
            valid = [name for name in EXPORT_FORMATS if not (reasons[name] if name in reasons else explain(name))]
            raise UserError(f"{where}.formats: {format!r} is not valid: {reason}; valid: {', '.join(valid)}")
