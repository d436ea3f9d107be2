"""Failures of workers, below Ray: a rank of two gloo processes raises, hangs or leaves in the middle of a step."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.run.launching.instances import run_instances
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.trainer import Trainer
from firstlight.tasks.collective import rank
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.state_hash import hash_state

TIMEOUT_S = 2.0
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def broken_pool() -> Iterator[Pool]:
    """A pool that nobody else uses: its group is left broken."""
    pool = Pool(2)
    yield pool
    pool.close()


def reconnect_ranks(store: str) -> None:
    """Makes new connections with a short timeout, as a restarted worker group does."""
    mine, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=mine, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
    )


def recipe(folder: Path) -> Any:
    """Returns the small recipe with its pretraining only."""
    whole = recipes.recipe(folder)
    return whole.model_copy(update={"stages": {"pretrain": whole.stages["pretrain"]}})


def attempt(folder: str, store: str, group: str, wanted: str, sleep: float = 0.0) -> dict[str, Any]:
    """Makes an attempt of a worker group at a training, with a fault. Returns this rank's answer or error, and when."""
    reconnect_ranks(group)
    os.environ["FIRSTLIGHT_FAULT"] = wanted
    instance = StageInstance("pretrain", 3, "f", Path(folder) / "job")
    payload = {"recipe": recipe(Path(folder)).dump(), "store": store, "work": "firstlight.pipeline.stages.pretrain"}
    payload["instances"] = [{k: str(v) if isinstance(v, Path) else v for k, v in asdict(instance).items()}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures.time, "sleep", lambda _: patch.undo() or time.sleep(sleep))
        start = time.monotonic()
        try:
            answer = run_instances(payload, on_ray=False, device=CPU)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "notes": error.__notes__}
        finally:
            os.environ.pop("FIRSTLIGHT_FAULT")
    return {**answer, "seconds": time.monotonic() - start}


def end_state(folder: Path) -> str:
    found, _ = Checkpoints(folder / "job" / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards])


@pytest.fixture(scope="module")
def clean(broken_pool: Pool, digits: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clean")
    for answer in broken_pool.run(attempt, str(folder), str(digits.path), str(folder / "group"), ""):
        assert answer["stop"] is None, answer
    return end_state(folder)


@pytest.mark.fault(4, "a rank hangs")
@pytest.mark.fault(5, "a rank returns early")
@pytest.mark.parametrize("kind", ["raise", "hang"])
def test_gone_rank_is_detected_in_time_and_next_attempt_is_bit_identical(
    tmp_path: Path, broken_pool: Pool, digits: Store, clean: str, kind: str
) -> None:
    """A rank that raised or returned does not answer, as one that hangs: the other fails within its timeout."""
    wanted = f"rank=1,step=4,kind={kind},once={tmp_path / 'once'}"
    other, faulty = broken_pool.run(
        attempt, str(tmp_path), str(digits.path), str(tmp_path / "one"), wanted, 1.5 * TIMEOUT_S
    )
    assert failures.is_secondary(other["error"])
    assert other["notes"] == ["after step 4"]
    assert other["seconds"] < 2 * TIMEOUT_S + 4, "with the steps before it"
    if kind == "raise":
        assert "injected fault" in faulty["error"]
    found, _ = Checkpoints(tmp_path / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.step == 3
    for answer in broken_pool.run(attempt, str(tmp_path), str(digits.path), str(tmp_path / "two"), wanted):
        assert answer["stop"] is None
    assert end_state(tmp_path) == clean


@pytest.mark.fault(3, "the same error at the same step, between two processes")
def test_same_error_twice_at_the_same_step_stops_the_third_attempt(
    tmp_path: Path, broken_pool: Pool, digits: Store
) -> None:
    for k in range(2):
        other, faulty = broken_pool.run(
            attempt, str(tmp_path), str(digits.path), str(tmp_path / str(k)), "rank=1,step=2,kind=raise"
        )
        assert failures.is_secondary(other["error"])
        assert "injected fault" in faulty["error"]
    answers = broken_pool.run(
        attempt, str(tmp_path), str(digits.path), str(tmp_path / "third"), "rank=1,step=2,kind=raise"
    )
    (message,) = {answer["stop"] for answer in answers}
    assert message.startswith("job: rank 1 failed twice after step 2 of RuntimeError: injected fault: rank=1,step=2,")
    assert message.endswith("; it was not tried again")
    failures.delete_failures(tmp_path / "job")
    for answer in broken_pool.run(attempt, str(tmp_path), str(digits.path), str(tmp_path / "mended"), ""):
        assert answer["stop"] is None, "a new command tries again"


def leave_within_step(folder: str, store: str, group: str) -> list[Any]:
    """Rank 1 leaves between the losses and the gradients of step 3. Returns the error and the weights of this rank."""
    reconnect_ranks(group)
    context = StageContext.create(recipe(Path(folder)), Store.open(Path(store)), on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", Path(folder) / "job"))
    learner, real = pretrain_job.build_seeded_method(context, stage, job), Trainer._judge_loss

    def leaves(self: Trainer, loss: Any, batch: Any, step: int) -> None:
        real(self, loss, batch, step)
        if step == 3 and rank() == 1:
            raise RuntimeError("left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_judge_loss", leaves)
        try:
            fit(job, learner)
        except RuntimeError as error:
            return [str(error), {name: value.detach().clone() for name, value in learner.named_parameters()}]
    return []


@pytest.mark.fault(6, "gradients that do not arrive")
def test_missing_gradients_change_no_weight(tmp_path: Path, broken_pool: Pool, digits: Store, clean: str) -> None:
    answers = broken_pool.run(leave_within_step, str(tmp_path), str(digits.path), str(tmp_path / "one"))
    (error, weights), (left, _) = answers
    assert left == "left"
    assert failures.is_secondary(error)
    found, _ = Checkpoints(tmp_path / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.step == 3
    for name, value in weights.items():
        assert torch.equal(found.shared["model"][name], value), name
    for answer in broken_pool.run(attempt, str(tmp_path), str(digits.path), str(tmp_path / "two"), ""):
        assert answer["stop"] is None
    assert end_state(tmp_path) == clean


class UserExceptionWithTraceback(Exception):
    """An error as Ray raises it: its text is the traceback."""


CLOSED = UserExceptionWithTraceback(
    "Traceback\nRuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:540] Connection closed by "
    "peer\nafter step 3"
)


@pytest.mark.fault(2, "the rank that failed is named")
@pytest.mark.fault(4, "the rank that is silent is named")
@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (
            {1: UserExceptionWithTraceback("Traceback\nValueError: bad\nafter step 3")},
            "rank 1: ValueError: bad (after step 3)",
        ),
        ({0: CLOSED, 2: UserExceptionWithTraceback("ValueError: bad")}, "rank 2: ValueError: bad"),
        ({0: CLOSED, 1: ConnectionError("The actor died")}, "rank 1: ConnectionError: The actor died"),
        ({1: ConnectionError()}, "rank 1: ConnectionError: died"),
        (
            {0: CLOSED, 2: CLOSED},
            "no answer from rank 1 within scale.collective_timeout_s: 60 (rank 0: RuntimeError: "
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:540] Connection closed by peer (after step 3))",
        ),
    ],
)
def test_cause_is_named_with_its_rank_instead_of_secondary_errors(
    errors: dict[int, BaseException], message: str
) -> None:
    assert failures.describe_cause(errors, workers=3, timeout_s=60) == message


@pytest.mark.fault(3, "what counts as the same error")
def test_only_same_error_after_same_step_counts_as_repeated(tmp_path: Path) -> None:
    def fail(error: Exception, note: str) -> None:
        error.add_note(note)
        with pytest.raises(type(error)), failures.record_failures(tmp_path):
            raise error

    for error, note in (
        (ValueError("bad"), "after step 3"),
        (ValueError("bad"), "after step 4"),
        (ValueError("worse"), "after step 3"),
        (KeyError("bad"), "after step 3"),
        (RuntimeError("Connection closed by peer"), "after step 5"),
        (RuntimeError("Connection closed by peer"), "after step 5"),
        (StopTraining("asked to"), "after step 6"),
        (StopTraining("asked to"), "after step 6"),
    ):
        fail(error, note)
    fail(ValueError("bad"), "after step 4")
    with pytest.raises(
        StopTraining, match=r"rank 0 failed twice after step 4 of ValueError: bad; it was not tried again$"
    ):
        fail(ValueError("other"), "")


class NoticeAtStep:
    """Counts the questions, and gives a notice from a time on."""

    def __init__(self, begins: float, notice: failures.PreemptionNotice | None) -> None:
        self.begins, self.notice, self.now, self.asked = begins, notice, 0.0, 0

    def __call__(self) -> failures.PreemptionNotice | None:
        self.asked += 1
        return self.notice if self.now >= self.begins else None


def look_at_steps(source: NoticeAtStep, steps: int, step_s: float) -> list[int]:
    """Returns the steps after which a checkpoint is due, of steps that take `step_s` seconds."""
    due = []
    with pytest.MonkeyPatch.context() as patch, failures.preemption_from(source):
        patch.setattr(failures.time, "monotonic", lambda: source.now)
        watch = failures.PreemptionWatch()
        for step in range(1, steps + 1):
            source.now += step_s
            if watch.find_notice(step) is not None:
                due.append(step)
    return due


NOTICE = failures.PreemptionNotice(1, (1, 3))


@pytest.mark.parametrize("step_s", [0.01, 0.5, 7.0])
def test_notice_is_found_within_seconds_and_saved_again_while_it_stands(step_s: float) -> None:
    source = NoticeAtStep(60.0, NOTICE)
    due = look_at_steps(source, round(120 / step_s), step_s)
    assert source.asked <= 120 / min(max(5.0, step_s), 7.0) + 3
    first, *later = (step * step_s for step in due)
    assert 60.0 <= first <= 60.0 + max(5.0, step_s) + step_s
    assert 1 <= len(later) <= 3
    assert all(after - before > 19.9 for before, after in zip([first, *later], later, strict=False))


def test_watch_asks_only_clusters_and_saves_only_on_a_notice() -> None:
    assert failures.PreemptionWatch().find_notice(1) is None
    source = NoticeAtStep(1e9, NOTICE)
    assert look_at_steps(source, 100, 1.0) == []
    assert source.asked > 10


def test_notice_is_described_in_words() -> None:
    assert str(NOTICE) == "a machine is about to be taken away (ranks 1, 3)"
    assert str(failures.PreemptionNotice(2, (0,))) == "2 machines are about to be taken away (rank 0)"


def train_until_notice(folder: str, store: str) -> list[int]:
    """Trains with a notice for all ranks after step 2, whose steps rank 1 counts differently."""
    context = StageContext.create(recipe(Path(folder)), Store.open(Path(store)), on_ray=False)
    # No other checkpoint is due before the end.
    stage: Any = context.recipe.stages["pretrain"].model_copy(update={"checkpoint_every": 1_000_000})
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", Path(folder) / "job"))
    asked: list[int] = []

    def answer() -> failures.PreemptionNotice | None:
        asked.append(len(asked))
        return NOTICE if len(asked) >= 2 else None

    saved: list[int] = []
    save = Trainer.save_checkpoint
    with pytest.MonkeyPatch.context() as patch, failures.preemption_from(answer):
        patch.setattr(failures, "PREEMPTION_LOOK_S", 0.0 if rank() == 0 else 1e6)
        patch.setattr(Trainer, "save_checkpoint", lambda self, step: saved.append(step) or save(self, step))
        fit(job, pretrain_job.build_seeded_method(context, stage, job))
    return saved


def test_all_ranks_save_after_the_same_step(pool: Pool, tmp_path: Path, digits: Store) -> None:
    one, other = pool.run(train_until_notice, str(tmp_path), str(digits.path))
    assert one == other
    assert one[0] == 2
    notes = (tmp_path / "job" / "metrics.jsonl").read_text()
    assert "a machine is about to be taken away (ranks 1, 3): a checkpoint was written after step 2" in notes
