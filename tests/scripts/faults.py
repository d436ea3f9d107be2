"""The fault matrix: runs the tests of each fault and writes the table of docs/reliability.md.

Usage: `python -m tests.scripts.faults [--slow]`. A test names its row by `@pytest.mark.fault(row, "what exactly")`.
Without `--slow` tests that start Ray are left out. `--of FILE ...`
runs nothing, and takes what pytest has left of earlier runs (`--junitxml`).
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.paths import ROOT

PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
SURVIVED, REFUSED = "survived", "refused"
PHASES = {  # of `make test`, and those that it leaves out: a run of pytest each
    "quick": ["-n", "2", "--dist", "loadfile", "-m", "fault and not ray and not slow"],
    "ray": ["-m", "fault and (ray or slow)"],
}

# row: (the fault, what becomes of it)
FAULTS: dict[int, tuple[str, str]] = {
    1: ("a worker is killed (SIGKILL)", SURVIVED),
    2: ("a worker raises", SURVIVED),
    3: ("the same error at the same step, twice", REFUSED),
    4: ("a worker hangs", SURVIVED),
    5: ("a worker returns early", SURVIVED),
    6: ("gradients do not arrive", SURVIVED),
    7: ("a node is lost", SURVIVED),
    8: ("the command is killed (SIGKILL)", SURVIVED),
    9: ("SIGTERM", SURVIVED),
    10: ("Ctrl-C, also twice", SURVIVED),
    11: ("object store too small", REFUSED),
    12: ("decoded images larger than memory", REFUSED),
    13: ("too few CPUs for the workers", REFUSED),
    14: ("no CPU left for decoding", REFUSED),
    15: ("trials with workers of their own", SURVIVED),
    16: ("disk full", REFUSED),
    17: ("checkpoint or encoder cut short", SURVIVED),
    18: ("a bit flipped", SURVIVED),
    19: ("killed between the files of a checkpoint", SURVIVED),
    20: ("Ray's own record of a run damaged", SURVIVED),
    21: ("a run of the same name again", SURVIVED),
    22: ("two runs of one name at once", REFUSED),
    23: ("names with .., /, nothing or 300 characters", REFUSED),
    24: ("storage that cannot be written", REFUSED),
    25: ("images that are empty, garbage or cut off", SURVIVED),
    26: ("PNG with a wrong checksum", SURVIVED),
    27: ("decompression bombs", REFUSED),
    28: ("images of extreme shape", SURVIVED),
    29: ("images of every mode and depth", SURVIVED),
    30: ("broken EXIF", SURVIVED),
    31: ("animations, bytes behind the end", SURVIVED),
    32: ("no images", REFUSED),
    33: ("fewer images than a batch", REFUSED),
    34: ("one class, labels out of range or unknown", REFUSED),
    35: ("an image or id twice", REFUSED),
    36: ("an id out of range", REFUSED),
    37: ("a loss that is not finite", REFUSED),
    38: ("zeros, equal images, huge values in a loss", SURVIVED),
    39: ("an assignment of NaN", REFUSED),
    40: ("a batch of one", REFUSED),
    41: ("MLflow is down, at the start or in the middle", SURVIVED),
    42: ("many writers on one SQLite file", SURVIVED),
    43: ("file: as tracking.uri", REFUSED),
    44: ("wrong keys, values and types in a recipe", REFUSED),
    45: ("traps of YAML", SURVIVED),
    46: ("YAML bombs and tags", REFUSED),
    47: ("an encoder that does not fit", REFUSED),
    48: ("continued on another number of workers", SURVIVED),
    49: ("continued with other threads or another torch", SURVIVED),
    50: ("an earlier stage that has not finished, or is damaged", REFUSED),
    51: ("pickles", REFUSED),
    52: ("hostile safetensors files", REFUSED),
    53: ("hostile archives", REFUSED),
    54: ("paths that lead out of their root", REFUSED),
    55: ("odd names of classes, params twice", SURVIVED),
    56: ("no home folder, a clock that jumps", SURVIVED),
    57: ("an upload to a bucket is killed", SURVIVED),
    58: ("an object in a bucket is damaged or missing", SURVIVED),
    59: ("a bucket cannot be reached in the middle of a run", SURVIVED),
    60: ("a bucket that cannot be written", REFUSED),
}
WITHOUT_TEST: dict[int, str] = {}


@dataclass
class Row:
    """The results of the tests of a row."""

    tests: dict[str, str] = field(default_factory=dict)  # id of a test -> passed, failed, skipped, or not run
    seconds: float = 0.0

    def line(self, number: int) -> str:
        name, outcome = FAULTS[number]
        ran = [state for state in self.tests.values() if state != "not run"]
        told = f"{len(ran)} of {len(self.tests)}" if len(ran) < len(self.tests) else str(len(ran))
        if "failed" in ran:
            outcome = "FAILED"
        elif not ran and number not in WITHOUT_TEST:
            outcome = f"{outcome} (not run)"
        seconds = f"{self.seconds:.1f}" if ran else ""
        return f"| {number} | {name} | {outcome} | {WITHOUT_TEST.get(number, told)} | {seconds} |"


class Collector:
    """A plugin of pytest: the rows of every marked test."""

    def __init__(self) -> None:
        self.rows = {number: Row() for number in FAULTS}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("fault"):
                self.rows[mark.args[0]].tests[_name(item.nodeid)] = "not run"


def _name(nodeid: str) -> str:
    """tests/a/test_b.py::test_c[d] -> tests.a.test_b::test_c[d], as pytest's results have it."""
    file, _, test = nodeid.partition("::")
    return f"{file.removesuffix('.py').replace('/', '.')}::{test}"


def outcomes(file: Path) -> dict[str, tuple[str, float]]:
    """Returns the outcome of each test by its name, and the seconds that it took."""
    found = {}
    for case in ElementTree.parse(file).iter("testcase"):
        wrong = [
            kind
            for kind, tag in (("failed", "failure"), ("failed", "error"), ("skipped", "skipped"))
            if case.find(tag) is not None
        ]
        found[f"{case.get('classname')}::{case.get('name')}"] = (
            wrong[0] if wrong else "passed",
            float(case.get("time", 0.0)),
        )
    return found


def learn(rows: dict[int, Row], files: Sequence[Path]) -> None:
    """Put into the rows what became of their tests. A test of several rows counts in each."""
    for file in files:
        for name, (state, seconds) in outcomes(file).items():
            for row in rows.values():
                if name in row.tests:
                    row.tests[name] = state
                    row.seconds += seconds


def table(rows: dict[int, Row]) -> str:
    lines = ["| row | fault | outcome | tests | seconds |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(rows[number].line(number) for number in FAULTS)])


def write(text: str) -> None:
    """Between the marker lines of the page."""
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")


def run(phases: Sequence[str], folder: Path) -> list[Path]:
    files = [folder / f"{phase}.xml" for phase in phases]
    for phase, file in zip(phases, files, strict=True):
        subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *PHASES[phase], f"--junitxml={file}"],
            cwd=ROOT,
            check=False,
        )
    return files


def main(slow: bool, of: Sequence[Path]) -> int:
    """1 where a test failed."""
    collector, start = Collector(), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(
            ["--collect-only", "-p", "no:cacheprovider", "-m", "fault", str(ROOT / "tests")], plugins=[collector]
        )
    with tempfile.TemporaryDirectory() as folder:
        learn(collector.rows, of or run(["quick", "ray"] if slow else ["quick"], Path(folder)))
    states = {name: state for row in collector.rows.values() for name, state in row.tests.items()}
    ran = sum(state != "not run" for state in states.values())
    told = f"{ran:,} of {len(states):,} tests of rows" + ("." if of else f" in {time.monotonic() - start:.0f} s.")
    text = f"{table(collector.rows)}\n\n{told}"
    print(text)
    write(text)
    return int("failed" in states.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also those that start Ray")
    parser.add_argument("--of", type=Path, nargs="+", default=[], metavar="FILE", help="results of earlier runs")
    given = parser.parse_args()
    sys.exit(main(given.slow, given.of))
