"""As `traced`, a quarter of a second a step: time in which something can happen to it."""

import time
from typing import Any

from pipeline import pretrain
from pipeline.fit import fit
from pipeline.stage import Instance
from pipeline.worker import Worker
from tests.traced import Traced

STEP_S = 0.25


class Slow(Traced):
    def end_step(self) -> None:
        time.sleep(STEP_S)
        super().end_step()


def work(worker: Worker, stage: Any, instance: Instance) -> None:
    job = pretrain.job(worker, stage, instance)
    fit(job, Slow(job))
