"""A new Python that runs the code of several cards, one after the other: its imports take longer than the code."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Answers have a file of their own, because libraries print.
PROGRAM = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    folder, code = json.loads(line)
    os.chdir(folder)
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""


class CardPython:
    """A process with this environment, by default that of the tests. `before`: what it runs first."""

    def __init__(self, before: str = "", environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", before + PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, code: str, folder: Path) -> str:
        """Returns what the code prints when it runs in `folder`, with no names of the code before it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(folder), code]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the process has ended: {self._process.wait(60)}"
        printed, error = json.loads(answer)
        assert not error, error
        return str(printed)

    def close(self) -> None:
        self._process.communicate(timeout=60)
