"""Fault injection, for tests: FIRSTLIGHT_FAULT="rank=1,step=3,kind=sigkill,once=/path" makes one worker fail, once (without `once`, always). Off
unless it is set."""

import os
import signal
import time
from pathlib import Path


def maybe(rank: int, step: int) -> None:
    """Fail if this is the rank and the step; `once` names the file that remembers it has happened."""
    text = os.environ.get("FIRSTLIGHT_FAULT")
    if not text:
        return
    fault = dict(part.split("=", 1) for part in text.split(","))
    if (rank, step) != (int(fault["rank"]), int(fault["step"])) or ("once" in fault and Path(fault["once"]).exists()):
        return
    if "once" in fault:
        Path(fault["once"]).touch()
    if fault["kind"] == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["kind"] == "hang":
        time.sleep(86_400)
    else:
        raise RuntimeError(f"injected fault: {text}")
