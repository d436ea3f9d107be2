"""Weights & Biases, offline unless the environment says otherwise: files in `<storage>/wandb`.

Its package takes seconds to import, so it is imported when the first log is opened.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from firstlight.pipeline.tracking.loggers.contract import LoggedNumber, LoggedRun, RunLogger
from firstlight.pipeline.tracking.loggers.wandb_files import STEP_KEY, read_wandb_logs

MODE_VARIABLE, FOLDER_VARIABLE, PROJECT_VARIABLE = "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"
# Modes in which W&B sends nothing
OFFLINE_MODES = ("offline", "dryrun", "disabled")
# The values that count if the user's environment does not say otherwise. Without the first, every run needs the network
# and an account; without the second, errors of the package are sent to its makers.
WANDB_DEFAULTS = {MODE_VARIABLE: "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


class WandbLogger(RunLogger):
    """Writes one more folder each time a run is opened; `wandb sync` puts all folders of a run together.

    The id of a run is that of MLflow. W&B's own step counts rows; the step of a number is the metric
    `trainer/global_step`, as in Lightning's logger, and all panels have it as their axis.
    """

    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    @classmethod
    def find_problem(cls) -> str:
        """Returns a problem if the environment asks for another mode, in which W&B would ask for a login."""
        mode = os.environ.get(MODE_VARIABLE, "offline")
        if mode in OFFLINE_MODES:
            return ""
        _set_defaults()
        import wandb

        if wandb.login(prompt=False, verify=False):
            return ""
        return f"{MODE_VARIABLE} is {mode!r}, and there is no API key; set WANDB_API_KEY, or {MODE_VARIABLE}=offline"

    def __init__(self, run: LoggedRun) -> None:
        _set_defaults()
        import wandb

        folder = Path(os.environ.get(FOLDER_VARIABLE) or run.storage)
        folder.mkdir(parents=True, exist_ok=True)
        found = read_wandb_logs(folder, run.id)
        self._numbers, self._images, self._rows = found.numbers, found.images, found.num_rows
        self._run = wandb.init(
            dir=folder,
            project=os.environ.get(PROJECT_VARIABLE) or run.experiment,
            id=run.id,
            resume="allow",
            name=run.name,
            group=run.recipe,
            job_type=run.kind,
            notes=run.description or None,
            config={**run.params, **run.tags},
            # Runs of a recipe are open at the same time.
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("*", step_metric=STEP_KEY)

    def list_numbers(self) -> Iterable[tuple[str, int, float]]:
        return self._numbers

    def list_images(self) -> Iterable[tuple[str, str]]:
        return self._images

    def log_numbers(self, numbers: Sequence[LoggedNumber]) -> None:
        rows: dict[int, dict[str, float]] = {}
        for number in numbers:
            row = rows.setdefault(number.step, {})
            if number.key in row:
                # A result that has changed
                self._write_row({STEP_KEY: number.step, number.key: row.pop(number.key)})
            row[number.key] = number.value
        for step, row in rows.items():
            self._write_row({STEP_KEY: step, **row})

    def log_image(self, name: str, file: Path, title: str) -> None:
        import wandb

        self._write_row({STEP_KEY: 0, name: wandb.Image(str(file), caption=title)})

    def _write_row(self, row: dict[str, object]) -> None:
        self._run.log(row, step=self._rows)
        self._rows += 1

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


def _set_defaults() -> None:
    for key, value in WANDB_DEFAULTS.items():
        os.environ.setdefault(key, value)
