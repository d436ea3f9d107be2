"""The step timer: parts inside parts, other threads, and a GPU that a stub replaces."""

import threading
import time

import pytest
import torch

from firstlight.tasks.device import timer
from firstlight.tasks.device.timer import StepTimer

CPU = torch.device("cpu")


class Times:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.now)


def nested(clock: StepTimer, times: Times) -> None:
    with clock.time_part("forward"):
        times.now += 1.0
        with clock.time_part("tables"):
            times.now += 2.0
            with clock.time_part("communication"):
                times.now += 4.0
            times.now += 8.0
        times.now += 16.0
    times.now += 32.0
    with clock.time_part("forward"):
        times.now += 64.0


def test_time_of_an_inner_part_is_not_in_the_outer_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = StepTimer(), Times(monkeypatch)
    with clock.time_thread(CPU):
        nested(clock, times)
        assert clock.read_seconds() == {"forward": 81.0, "tables": 10.0, "communication": 4.0}
        assert clock.read_seconds() == {}, "each second is read once"


def test_failing_part_is_counted_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = StepTimer(), Times(monkeypatch)
    with clock.time_thread(CPU):

        @clock.time_part("forward")
        def fails() -> None:
            times.now += 3.0
            raise ValueError("stop")

        with pytest.raises(ValueError, match="stop"):
            fails()
        with clock.time_part("backward"):
            times.now += 1.0
        assert clock.read_seconds() == {"forward": 3.0, "backward": 1.0}


def test_timer_counts_its_own_thread_while_running_only() -> None:
    clock = StepTimer()
    with clock.time_part("before"):
        pass
    with clock.time_thread(CPU):
        with clock.time_part("mine"):
            other = threading.Thread(target=clock.time_part("theirs")(lambda: time.sleep(0.01)))
            other.start()
            other.join()
        found = clock.read_seconds()
    assert list(found) == ["mine"]
    assert found["mine"] >= 0.01
    with clock.time_part("after"):
        pass
    assert clock.read_seconds() == {}


def test_late_end_of_a_training_does_not_stop_the_next_timer() -> None:
    clock = StepTimer()
    first = clock.time_thread(CPU)
    first.__enter__()
    with clock.time_thread(CPU):
        first.__exit__(None, None, None)
        with clock.time_part("forward"):
            pass
        assert list(clock.read_seconds()) == ["forward"]


def test_gpu_events_are_read_only_by_read_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub gives the milliseconds of GPU events. The nesting is that of the CPU."""
    clock, times, waited = StepTimer(), Times(monkeypatch), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = times.now

        def elapsed_time(self, other: "Event") -> float:
            assert waited, "the GPU was not waited for"
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    with clock.time_thread(torch.device("cuda")):
        nested(clock, times)
        assert waited == []
        assert clock.read_seconds() == {"forward": 81.0, "tables": 10.0, "communication": 4.0}
        clock.read_seconds()
    assert len(waited) == 1
