"""TensorBoard: event files in `<storage>/tensorboard/<recipe>/<run>`.

TensorBoard's scalars have single precision. Its packages take a second to import, so they are imported when the first
log is opened.
"""

import hashlib
import io
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from firstlight.pipeline.tracking.loggers.contract import LoggedNumber, LoggedRun, RunLogger

TENSORBOARD_FOLDER = "tensorboard"
EVENT_FILES = "events.out.tfevents.*"
# The number of characters of the id of a run in the name of its folder
TENSORBOARD_ID_LENGTH = 8
# The number of colour channels, as TensorBoard's images note it
COLOUR_SPACES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


class TensorBoardLogger(RunLogger):
    """Writes one more event file into the folder of a run each time the run is opened, as TensorBoard reads them all.

    Parameters are those of TensorBoard's page HPARAMS, and parameters and tags are on its page TEXT.
    """

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def __init__(self, run: LoggedRun) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder = locate_events(run)
        self._numbers, self._images = _read_events(self.folder)
        is_new = not any(self.folder.glob(EVENT_FILES))
        self._writer = EventFileWriter(str(self.folder))
        if is_new:
            self._write_start(run)

    def list_numbers(self) -> Iterable[tuple[str, int, float]]:
        return self._numbers

    def list_images(self) -> Iterable[tuple[str, str]]:
        return self._images

    def log_numbers(self, numbers: Sequence[LoggedNumber]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for number in numbers:
            summary = Summary(value=[Summary.Value(tag=number.key, simple_value=number.value)])
            self._write(summary, number.step, number.time)
        self._writer.flush()

    def log_image(self, name: str, file: Path, title: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            width, height, channels = opened.width, opened.height, COLOUR_SPACES.get(opened.mode, 3)
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=data)
        self._write(Summary(value=[Summary.Value(tag=name, image=image)]))
        self._writer.flush()

    def finish(self, status: str) -> None:
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        state = STATUS_SUCCESS if status == "FINISHED" else STATUS_FAILURE
        ended = SessionEndInfo(status=state, end_time_secs=time.time())
        self._write_session(SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=ended))
        self._writer.close()

    def _write_start(self, run: LoggedRun) -> None:
        from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
        from tensorboard.plugins.text.summary_v2 import text_pb

        started = SessionStartInfo(start_time_secs=time.time())
        for key, value in run.params.items():
            started.hparams[key].string_value = value
        self._write_session(SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=started))
        texts = {"description": run.description, "params": _draw_table(run.params), "tags": _draw_table(run.tags)}
        for name, text in texts.items():
            if text:
                self._write(text_pb(name, text))
        self._writer.flush()

    def _write_session(self, tag: str, data: Any) -> None:
        """Writes what the page HPARAMS reads. The package's own function for it needs TensorFlow."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.metadata import NULL_TENSOR, create_summary_metadata

        value = Summary.Value(tag=tag, metadata=create_summary_metadata(data), tensor=NULL_TENSOR)
        self._write(Summary(value=[value]))

    def _write(self, summary: Any, step: int = 0, wall_time: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=wall_time or time.time(), step=step, summary=summary))


def locate_events(run: LoggedRun) -> Path:
    """Returns the folder of the event files of a run. TensorBoard shows its path below the recipe's as its name."""
    name = re.sub(r"[^\w.-]+", "-", run.name)
    return run.storage / TENSORBOARD_FOLDER / run.recipe / f"{name}-{run.id[:TENSORBOARD_ID_LENGTH]}"


def _read_events(folder: Path) -> tuple[list[tuple[str, int, float]], list[tuple[str, str]]]:
    """Returns the numbers and the images in the event files of a folder. A torn last event of a file is left out."""
    numbers, images = [], []
    for event in _iterate_events(folder):
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                numbers.append((str(value.tag), int(event.step), float(value.simple_value)))
            elif kind == "image":
                images.append((str(value.tag), hashlib.sha256(value.image.encoded_image_string).hexdigest()))
    return numbers, images


def _iterate_events(folder: Path) -> Iterator[Any]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for file in sorted(folder.glob(EVENT_FILES)):
        yield from LegacyEventFileLoader(str(file)).Load()


def _draw_table(values: Mapping[str, str]) -> str:
    """Returns a table in Markdown; "" without rows."""
    rows = [f"| {key} | {_escape_cell(value)} |" for key, value in values.items()]
    return "\n".join(["| key | value |", "|---|---|", *rows]) if rows else ""


def _escape_cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
