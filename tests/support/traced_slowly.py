"""As `traced`, a quarter of a second a step, until a file says that nothing more is to happen to it."""

import time
from typing import Any

from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.loop import fit
from tests.support.traced import Traced

STEP_S, HURRY = 0.25, "hurry"  # HURRY: in the folder of the training


class Slow(Traced):
    def end_step(self) -> None:
        if not (self.job.folder / HURRY).exists():
            time.sleep(STEP_S)
        super().end_step()


def work(worker: Worker, stage: Any, instance: Instance) -> None:
    job = pretrain.job(worker, stage, instance)
    fit(job, Slow(job))
