"""The folder of a format, which exists only if the network in it gives the values of the original."""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from firstlight.pipeline.data.manifest import file_sha256
from firstlight.pipeline.errors import StageFailed, one_line
from firstlight.pipeline.stages.exporting.comparison import compare_answers
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import MAP_TOLERANCE


class NetworkExporter(Protocol):
    """A network with a method for each format, named as the format, which takes a folder, writes the format into it and
    returns the network as others load it (a `NetworkAnswer`), and facts about it.
    """

    @property
    def what(self) -> str:
        """Returns `encoder` or `model`, for messages."""

    @property
    def instance(self) -> StageInstance: ...

    @property
    def encoder(self) -> Encoder: ...

    def answer_images(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs of the original for (B, 3, S, S) images in 0..1."""

    def explain_missing(self, format: str) -> str | None:
        """Returns the reason why the network cannot be exported in a format; None if it can."""


def export_format(exporter: NetworkExporter, format: str, folder: Path, tests: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a format, compares it with the network, and only then moves it to its final folder, `folder/<format>`.
    Returns its facts for the result.

    Raises:
        StageFailed: it gives other values than the network, or cannot be written. No file of any format is left.
    """
    part = folder / f".{format}"
    part.mkdir(parents=True)
    try:
        with _silence_exporters():
            answer, facts = getattr(exporter, format)(part)
            differences = compare_answers(exporter.answer_images, answer, tests)
    except Exception as error:  # the exporters of others fail in ways of their own
        shutil.rmtree(folder)
        raise StageFailed(f"{exporter.instance.label}: {format} cannot be exported: {_error_line(error)}") from error
    worst = max(found["relative"] for found in differences.values())
    if not worst <= MAP_TOLERANCE:
        shutil.rmtree(folder)
        raise StageFailed(
            f"{exporter.instance.label}: {format} differs from the {exporter.what} by {worst:.2g} of its largest "
            f"value; at most {MAP_TOLERANCE:g} is rounding"
        )
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(part.iterdir())}
    part.rename(folder / format)
    return {"files": files, "difference": differences, **facts}


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
    return one_line(f"{type(error).__name__}: {error}", limit=300)
