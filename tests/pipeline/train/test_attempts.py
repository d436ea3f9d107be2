import json
from pathlib import Path

import pytest
import torch

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.train.attempts import ATTEMPTS_FILE, read_attempts, record_attempt


def test_attempts_are_summed_over_failures(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) is None
    with pytest.raises(ValueError, match="died"), record_attempt(tmp_path / "a", torch.device("cpu")):
        raise ValueError("died")
    with record_attempt(tmp_path / "a", torch.device("cpu")):
        running = read_attempts(tmp_path / "a")
        assert running is not None
        assert running.ended is None
    done = read_attempts(tmp_path / "a")
    assert done is not None
    assert done.num_attempts == 2
    assert done.ended is not None
    assert done.ended >= done.began
    rows = [json.loads(line) for line in (tmp_path / "a" / ATTEMPTS_FILE).read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert done.seconds == sum(seconds)
    assert {"host", "cpus", "workers", "versions"} <= done.machine.keys()
    assert done.machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    "row",
    ["[]", "3", '{"began": "now", "machine": {}}', '{"began": 1.0}', '{"began": 1.0, "machine": {"host": 3}}',
     '{"ended": NaN, "seconds": 1.0}', '{"ended": 1.0, "seconds": -1.0}'],
)  # fmt: skip
def test_row_that_is_no_attempt_is_named(tmp_path: Path, row: str) -> None:
    with record_attempt(tmp_path, torch.device("cpu")):
        pass
    with (tmp_path / ATTEMPTS_FILE).open("a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/attempts\.jsonl: line 3: is damaged: .*; delete this file"):
        read_attempts(tmp_path)
