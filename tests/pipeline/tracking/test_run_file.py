"""The note of a run that is damaged is named, and how to go on."""

from pathlib import Path

import pytest

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.run_file import read_run_file, read_run_id


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"run_id": 3}', '{"key": "x\'"}', '{"run_id": "a/b"}', '{"closed": 1}']
)
def test_note_of_a_run_that_is_damaged_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "mlflow.json").write_text(text)
    for read in (read_run_id, lambda folder: read_run_file(folder / "mlflow.json")):
        with pytest.raises(
            UserError, match=rf"^{tmp_path}/mlflow\.json: is damaged: .*; delete this file and run again"
        ):
            read(tmp_path)


@pytest.mark.fault(18, "a bit of the id of a run")
def test_changed_id_of_a_run_is_detected(tracking: TrackingClient, tmp_path: Path) -> None:
    file = tmp_path / "a" / "mlflow.json"
    run_id = tracking.start_run("a", file, {}, {})
    file.write_text(file.read_text().replace(run_id, ("0" if run_id[0] != "0" else "1") + run_id[1:]))
    with pytest.raises(UserError, match=r"mlflow\.json: is damaged: its content differs from its sum"):
        tracking.start_run("a", file, {}, {})
