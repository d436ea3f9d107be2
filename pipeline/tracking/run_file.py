"""The file in which a stage or a recipe notes its run in MLflow."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from firstlight.pipeline.records import RecordShape, read_json_record

RUN_FILE = "mlflow.json"
RUN_FILE_ADVICE = "delete this file and run again: the run begins as a new one in MLflow"


class _RunFileShape(RecordShape):
    """The notes about a run: its key; once it is created, its id and where it is; `closed` of a recipe's run."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]+\z")] = ""
    run_id: Annotated[str, Field(pattern=r"^[\w-]+\z")] = ""
    tracking_uri: str = ""
    closed: bool = False


RUN_FILE_SHAPE = TypeAdapter(_RunFileShape)


def read_run_id(folder: Path) -> str | None:
    """Returns the id of the run that is noted in `RUN_FILE` of a folder, None if none was started."""
    return read_run_file(folder / RUN_FILE).get("run_id")


def read_run_file(file: Path) -> dict[str, Any]:
    """Returns what `TrackingClient.start_run` has noted in a file, {} if no run was started.

    Raises:
        DamagedRecord: it is not what was noted; names the file.
    """
    return read_json_record(file, RUN_FILE_SHAPE, RUN_FILE_ADVICE) or {}
