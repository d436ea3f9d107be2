from pathlib import Path

import pytest
import torch

from firstlight.pipeline.train.attempts import read_attempts, record_attempt


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
    assert done.seconds >= 0
    assert {"host", "cpus", "workers", "versions"} <= done.machine.keys()
    assert done.machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
