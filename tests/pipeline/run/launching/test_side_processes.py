"""Seeds that several processes share: by a small program in place of theirs, and in real trainings."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.child_module import send_bytes
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed
from firstlight.pipeline.run import launch
from firstlight.pipeline.run.launching import side_processes
from firstlight.pipeline.run.launching.side_processes import SideProcesses, count_side_processes, is_long
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.state_hash import hash_state

# It writes its process id into the folder of an instance. The name of the stage says what it does then.
PROGRAM = """
import json, os, pathlib, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    (fields,) = json.loads(line)["instances"]
    folder, does = pathlib.Path(fields["folder"]), fields["stage"]
    folder.mkdir(parents=True)
    (folder / "pid").write_text(str(os.getpid()))
    if does == "die":
        os._exit(9)
    while does == "wait":
        time.sleep(1)
    ends = {"stop": {"stop": "not finite", "kind": "StopTraining"}, "err": {"problem": "err seed 1: Error: x"}}
    print(json.dumps({"unfit": "method"} if does == "unfit" else ends.get(does, {"stop": None})), flush=True)
"""


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> Iterator[SideProcesses]:
    """One process beside this one, which is started at once."""

    def start_program(name: str) -> subprocess.Popen[bytes]:
        assert name == side_processes.__name__
        return subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(side_processes, "WORTHWHILE_SECONDS", 0.0)
    monkeypatch.setattr(side_processes, "start_module", start_program)
    with SideProcesses(1, told.append) as others:
        yield others


def list_instances(folder: Path, does: str, *seeds: int) -> dict[str, Any]:
    fields = [{"stage": does, "seed": seed, "folder": str(folder / f"{does}{seed}")} for seed in seeds]
    return {"recipe": {}, "store": "store", "instances": fields}


def has_begun(folder: Path) -> Callable[[], bool]:
    """Returns a function that tells whether another process has begun the instance of a folder."""
    return (folder / "pid").exists


class Here:
    """Takes the place of `run_instances` in this process. The first instance waits until `until` returns True."""

    def __init__(self, until: Callable[[], bool] | None = None) -> None:
        self.until, self.seeds = until, list[int]()

    def __call__(self, payload: dict[str, Any]) -> dict[str, Any]:
        for fields in payload["instances"]:
            self.seeds.append(fields["seed"])
            end = time.monotonic() + 60
            while self.until and not self.until() and time.monotonic() < end:
                time.sleep(0.01)
            self.until = None
        return {"stop": None}


def test_waiting_seeds_are_taken_by_a_process_that_stays(
    others: SideProcesses, told: list[str], tmp_path: Path
) -> None:
    here = Here(until=has_begun(tmp_path / "a2"))
    assert others.run(list_instances(tmp_path, "a", 0, 1, 2), here) == {"stop": None}
    assert here.seeds == [0]
    assert told == ["seeds and fine-tunings are shared by 2 processes (scale.processes)"]
    assert others.run(list_instances(tmp_path, "b", 0, 1), Here(until=has_begun(tmp_path / "b1"))) == {"stop": None}
    pids = {(tmp_path / name / "pid").read_text() for name in ("a1", "a2", "b1")}
    assert pids == {str(process.pid) for process in others.processes}
    assert len(pids) == 1


def test_seed_of_a_process_that_has_ended_is_trained_here(others: SideProcesses, tmp_path: Path) -> None:
    here = Here(until=has_begun(tmp_path / "die1"))
    assert others.run(list_instances(tmp_path, "die", 0, 1), here) == {"stop": None}
    assert here.seeds == [0, 1]
    (row,) = map(json.loads, (tmp_path / "die1" / "metrics.jsonl").open())
    assert row["note"] == "a process that worked on die seed 1 has ended; another one goes on with it"


def test_a_process_that_does_not_know_a_method_gets_nothing_more(others: SideProcesses, tmp_path: Path) -> None:
    here = Here(until=has_begun(tmp_path / "unfit1"))
    assert others.run(list_instances(tmp_path, "unfit", 0, 1, 2), here) == {"stop": None}
    assert sorted(here.seeds) == [0, 1, 2]
    assert not (tmp_path / "unfit1" / "metrics.jsonl").exists()


def test_error_of_a_seed_in_another_process_ends_the_stage(others: SideProcesses, tmp_path: Path) -> None:
    here = Here(until=lambda: others.stage is not None and others.stage.end is not None)
    answer = others.run(list_instances(tmp_path, "stop", 0, 1, 2), here)
    assert answer == {"stop": "not finite", "kind": "StopTraining"}
    assert here.seeds == [0]
    assert not (tmp_path / "stop2").exists()
    assert others.processes == []


def test_unexpected_error_of_another_process_is_a_one_line_error(others: SideProcesses, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"^err seed 1: Error: x$"):
        others.run(list_instances(tmp_path, "err", 0, 1), Here(until=has_begun(tmp_path / "err1")))


@pytest.mark.parametrize("ends", [KeyboardInterrupt(), {"stop": "not finite", "kind": "StopTraining"}])
def test_processes_end_with_a_seed_that_ends_early_here(others: SideProcesses, tmp_path: Path, ends: Any) -> None:
    found = list[Any]()

    def run_here(payload: dict[str, Any]) -> dict[str, Any]:
        Here(until=has_begun(tmp_path / "wait1"))({"instances": [next(payload["instances"])]})
        found.extend(others.processes)
        if isinstance(ends, BaseException):
            raise ends
        return dict(ends)

    if isinstance(ends, BaseException):
        with pytest.raises(KeyboardInterrupt):
            others.run(list_instances(tmp_path, "wait", 0, 1), run_here)
    else:
        assert others.run(list_instances(tmp_path, "wait", 0, 1), run_here) == ends
    assert [process.returncode for process in found] == [-9]


def test_short_stage_starts_no_process(
    others: SideProcesses, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_processes, "WORTHWHILE_SECONDS", 600.0)
    here = Here()
    assert others.run(list_instances(tmp_path, "a", 0, 1), here) == {"stop": None}
    assert (here.seeds, others.processes, told) == ([0, 1], [], [])
    assert "start" not in [thread.name for thread in threading.enumerate()], "nothing is left that would start one"


def test_no_process_is_started_without_memory_for_it(
    others: SideProcesses, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_processes.memory, "free_memory", lambda: 2**20)
    others.start()
    assert (others.processes, told) == ([], [])


@pytest.mark.parametrize(
    ("seeds", "scale", "count"),
    [
        ([0, 1, 2], {}, 2),
        ([0, 1, 2, 3, 4, 5], {}, 3),
        ([0], {}, 0),
        ([0, 1, 2], {"cpus": 2}, 1),
        ([0, 1, 2], {"threads": 2}, 1),
        ([0, 1, 2], {"threads": 8}, 0),
        ([0, 1, 2], {"processes": 1}, 0),
        ([0, 1, 2], {"processes": 2, "threads": 8}, 1),
        ([0, 1, 2], {"workers": 2}, 0),
        ([0, 1, 2], {"gpus_per_worker": 1.0}, 0),
    ],
)
def test_there_are_no_more_processes_than_seeds_and_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: list[int], scale: dict[str, Any], count: int
) -> None:
    monkeypatch.setattr(side_processes, "count_usable_cpus", lambda: 4)
    whole = {"name": "local", "workers": 0, "gpus_per_worker": 0.0, **scale}
    recipe = recipes.recipe(tmp_path, seeds=seeds, scale=whole)
    del recipe.stages["finetune"]
    assert count_side_processes(recipe) == count


@pytest.mark.parametrize(("rates", "count"), [([], 1), ([0.1, 0.3], 3), ([0.1, 0.2, 0.3], 5)])
def test_fine_tunings_of_one_seed_may_have_a_process_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: list[float], count: int
) -> None:
    monkeypatch.setattr(side_processes, "count_usable_cpus", lambda: 16)
    scale = {"name": "local", "workers": 0, "gpus_per_worker": 0.0}
    recipe = recipes.recipe(tmp_path, seeds=[0], scale=scale, stages__finetune__learning_rates=rates)
    assert count_side_processes(recipe) == count, "two arms"


@pytest.mark.parametrize(
    ("seeds", "changes", "expected"),
    [
        # 96 of 110 images are in the batches of an epoch.
        ([0, 1], {"pretrain__epochs": 100}, False),
        ([0, 1], {"pretrain__epochs": 110}, True),
        ([0, 1], {"pretrain__epochs": None, "pretrain__steps": 300}, False),
        ([0, 1], {"pretrain__epochs": None, "pretrain__steps": 330}, True),
        # Nobody could share it.
        ([0], {"pretrain__epochs": 1000}, False),
        # Four trainings on 40 images.
        ([0], {"finetune__epochs": 120}, False),
        ([0], {"finetune__epochs": 130}, True),
    ],
)
def test_long_recipes_are_those_of_many_passes_that_can_be_shared(
    tmp_path: Path,
    digits: Store,
    monkeypatch: pytest.MonkeyPatch,
    seeds: list[int],
    changes: dict[str, Any],
    expected: bool,
) -> None:
    # The digits have 8 x 8 pixels.
    monkeypatch.setattr(side_processes, "LONG_PASSES", 20_000 / 4**2)
    recipe = recipes.recipe(tmp_path, seeds=seeds, **{f"stages__{key}": value for key, value in changes.items()})
    splits = StageContext.create(recipe, digits, on_ray=False).splits
    assert len(splits.train) == 110
    assert is_long(recipe, splits) == expected


@pytest.mark.parametrize(("image_size", "epochs", "expected"), [(32, 100, False), (32, 110, True), (64, 27, True)])
def test_passes_of_larger_images_count_by_their_pixels(
    tmp_path: Path, digits: Store, image_size: int, epochs: int, expected: bool
) -> None:
    """96 of 110 images are in the batches of an epoch, of two seeds."""
    recipe = recipes.recipe(tmp_path, seeds=[0, 1], stages__pretrain__epochs=epochs)
    splits = StageContext.create(recipe, digits, on_ray=False).splits
    dataset = recipe.dataset.model_copy(update={"image_size": image_size})
    assert is_long(recipe.model_copy(update={"dataset": dataset}), splits) == expected


def collect_results(recipe: Recipe) -> dict[str, Any]:
    """Returns the state of each training and the result of each stage, by the folder's name."""
    found: dict[str, Any] = {}
    for folder in (recipe.storage / recipe.name).glob("*-seed*"):
        found[folder.name] = json.loads((folder / "result.json").read_text())
        if folder.name.startswith("pretrain"):
            newest, _ = Checkpoints(folder / "checkpoints").read_newest()
            assert newest is not None
            found[folder.name] = found[folder.name], hash_state([newest.shared, newest.shards])
    return found


def three_seeds(folder: Path, processes: int) -> Recipe:
    scale = {"name": "local", "workers": 0, "gpus_per_worker": 0.0, "processes": processes}
    recipe = recipes.recipe(folder, seeds=[0, 1, 2], scale=scale)
    del recipe.stages["finetune"]
    return recipe


@pytest.mark.usefixtures("undrawn_figures")
def test_results_are_those_of_one_process_though_another_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two other processes is killed in mid-training, and the second one trains to the end."""
    alone = three_seeds(tmp_path / "alone", 1)
    expected = run_recipe(alone, Console(quiet=True)).rows
    answers, ask, begun = list[Any](), side_processes._ask, threading.Event()

    def ask_and_kill(process: subprocess.Popen[bytes], payload: dict[str, Any]) -> Any:
        if answers:
            answers.append(ask(process, payload))
            return answers[-1]
        answers.append(None)
        send_bytes(process, json.dumps(payload).encode() + b"\n")
        while not list(Path(payload["instances"][0]["folder"]).glob("checkpoints/*/manifest.json")):
            time.sleep(0.01)
        process.kill()
        begun.set()
        return None

    run_here = side_processes.SideProcesses.run

    def wait_for_others(self: SideProcesses, payload: dict[str, Any], run: Any) -> Any:
        """Begins here when another process has begun."""

        def run_later(own: dict[str, Any]) -> Any:
            self.start()
            if payload["instances"][0]["stage"] == "pretrain":
                assert begun.wait(300)
            return run(own)

        return run_here(self, payload, run_later)

    monkeypatch.setattr(side_processes, "_ask", ask_and_kill)
    monkeypatch.setattr(side_processes.SideProcesses, "run", wait_for_others)
    shared = three_seeds(tmp_path / "shared", 3)
    assert run_recipe(shared, Console(quiet=True)).rows == expected
    assert collect_results(shared) == collect_results(alone)
    assert answers[0] is None
    assert {"stop": None} in answers


def tuned_recipe(folder: Path, processes: int) -> Recipe:
    scale = {"name": "local", "workers": 0, "gpus_per_worker": 0.0, "processes": processes}
    return recipes.recipe(folder, seeds=[0], scale=scale, stages__finetune__epochs=4, **recipes.ONE_PROBE)


@pytest.mark.parametrize(
    ("durations", "current", "waiting", "rest"),
    [
        # The first one has not ended: it takes at least what it has taken without its set-up.
        ([], 1.5, 15, 0.0),
        ([], 2.5, 15, 7.5),
        ([], 5.0, 1, 3.0),
        # Sixteen short parts, the first of which has imported torch's compiler.
        ([1.4], 0.1, 14, 0.0),
        ([2.2, 0.1], 0.1, 13, 1.3),
        # Parts of three seconds and a half.
        ([5.5], 0.1, 2, 7.0),
        ([5.5, 3.4], 3.0, 1, 3.4),
    ],
)
def test_rest_of_a_stage_is_estimated_without_what_does_not_come_again(
    durations: list[float], current: float, waiting: int, rest: float
) -> None:
    stage = side_processes._SharedStage({"instances": [{}] * waiting})
    stage.durations, stage.begun = durations, time.monotonic() - current
    assert stage.estimate_rest() == pytest.approx(rest, abs=0.15 * waiting)


@pytest.mark.parametrize(("waiting", "is_started"), [(0, False), (1, False), (2, True)])
def test_no_process_is_started_for_less_work_than_its_start(
    others: SideProcesses, monkeypatch: pytest.MonkeyPatch, waiting: int, is_started: bool
) -> None:
    """A part has taken two and a half seconds."""
    stage = side_processes._SharedStage({"instances": [{}] * waiting})
    stage.durations = [9.0, 2.5]
    monkeypatch.setattr(side_processes, "WORTHWHILE_SECONDS", 4.0)
    started, ended = list[bool](), threading.Event()
    monkeypatch.setattr(others, "start", lambda: started.append(True))
    watcher = threading.Thread(target=others._start_for_waiting, args=(stage, ended))
    watcher.start()
    time.sleep(3 * side_processes.WAIT_S)
    assert watcher.is_alive() != is_started
    ended.set()
    watcher.join()
    assert started == [True] * is_started


def test_time_of_each_instance_here_is_noted(others: SideProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "start", lambda: None)
    durations: list[list[float]] = []

    def run_here(payload: dict[str, Any]) -> dict[str, Any]:
        assert others.stage is not None
        for fields in payload["instances"]:
            time.sleep(fields["seconds"])
            durations.append(list(others.stage.durations))
        durations.append(list(others.stage.durations))
        return {"stop": None}

    others.run({"instances": [{"seconds": 0.2}, {"seconds": 0.0}]}, run_here)
    assert [len(found) for found in durations] == [0, 1, 2]
    first, second = durations[-1]
    assert first >= 0.2 > second


@pytest.mark.usefixtures("undrawn_figures")
def test_fine_tunings_that_processes_share_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is killed in mid-training, and this one goes on with what it has left."""
    alone = tuned_recipe(tmp_path / "alone", 1)
    expected = run_recipe(alone, Console(quiet=True)).rows
    parts, ask, is_killed = list[str](), side_processes._ask, threading.Event()

    def ask_and_kill(process: subprocess.Popen[bytes], payload: dict[str, Any]) -> Any:
        (fields,) = payload["instances"]
        parts.append(fields.get("part", ""))
        if len(parts) < 2:
            return ask(process, payload)
        send_bytes(process, json.dumps(payload).encode() + b"\n")
        while not list(Path(fields["folder"], fields["part"]).glob("checkpoints/*/manifest.json")):
            time.sleep(0.01)
        process.kill()
        is_killed.set()
        return None

    run_shared = SideProcesses.run

    def begin_later(self: SideProcesses, payload: dict[str, Any], run: Any) -> Any:
        def run_later(own: dict[str, Any]) -> Any:
            self.start()
            assert is_killed.wait(300)
            return run(own)

        return run_shared(self, payload, run_later)

    monkeypatch.setattr(side_processes, "_ask", ask_and_kill)
    monkeypatch.setattr(SideProcesses, "run", begin_later)
    shared = tuned_recipe(tmp_path / "shared", 2)
    assert run_recipe(shared, Console(quiet=True)).rows == expected
    # This process has taken the first of four.
    assert parts == ["pretrained-lr0.3", "scratch-lr0.1"]
    assert collect_results(shared) == collect_results(alone)
    (first,), (second,) = ((tmp_path / name / "small").glob("finetune*") for name in ("alone", "shared"))
    for name in ("pretrained-lr0.1", "pretrained-lr0.3", "scratch-lr0.1", "scratch-lr0.3"):
        newest = [Checkpoints(folder / name / "checkpoints").read_newest()[0] for folder in (first, second)]
        states = [hash_state(found.shared) for found in newest if found is not None]
        assert states == states[:1] * 2
    assert sorted(p.relative_to(first) for p in first.rglob("model/*")) == sorted(
        p.relative_to(second) for p in second.rglob("model/*")
    )


def test_seeds_that_share_the_processes_evenly_are_not_divided(tmp_path: Path) -> None:
    recipe, instances = tuned_recipe(tmp_path, 2), [{"stage": "finetune", "seed": seed} for seed in range(4)]
    assert launch._list_rounds(recipe, instances, 2) == launch._list_rounds(recipe, instances, 4) == []
    trainings, arms = launch._list_rounds(recipe, instances, 3)
    assert len(trainings) == 16
    assert trainings[5] == {"stage": "finetune", "seed": 1, "part": "pretrained-lr0.3"}
    assert len(arms) == 8
    assert arms[5] == {"stage": "finetune", "seed": 2, "part": "scratch"}
    assert launch._list_rounds(recipe, [{"stage": "pretrain", "seed": 0}], 2) == []
