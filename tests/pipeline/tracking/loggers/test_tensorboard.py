"""Event files of TensorBoard."""

from pathlib import Path

from PIL import Image

from firstlight.pipeline.tracking.loggers.contract import LoggedNumber, LoggedRun
from firstlight.pipeline.tracking.loggers.tensorboard import EVENT_FILES, TensorBoardLogger, locate_events
from tests.support.logger_files import read_tensorboard


def make_run(storage: Path) -> LoggedRun:
    return LoggedRun("ab" * 16, "finetune seed 1", "small", "firstlight", storage, params={"lr": "0.1|2"})


def test_log_that_is_opened_again_holds_what_was_written(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    logger = TensorBoardLogger(run)
    assert not list(logger.list_numbers())
    logger.log_numbers([LoggedNumber("a b/loss", 3, 0.5, 10.0), LoggedNumber("score", 0, float("nan"), 11.0)])
    Image.new("L", (4, 3)).save(tmp_path / "x.png")
    logger.log_image("figures/x", tmp_path / "x.png", "x")
    again = TensorBoardLogger(run)
    assert [key_step[:2] for key_step in again.list_numbers()] == [("a b/loss", 3), ("score", 0)]
    assert [name for name, _ in again.list_images()] == ["figures/x"]
    again.finish("FINISHED")
    logger.finish("FAILED")
    folder = locate_events(run)
    assert folder == tmp_path / "tensorboard" / "small" / "finetune-seed-1-abababab"
    assert len(list(folder.glob(EVENT_FILES))) == 2
    found, _ = read_tensorboard(tmp_path)
    assert found["scalars"]["a b/loss"] == [(3, 0.5)]


def test_torn_last_event_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    logger = TensorBoardLogger(run)
    logger.log_numbers([LoggedNumber("loss", step, 0.5, 10.0) for step in (1, 2)])
    (file,) = locate_events(run).glob(EVENT_FILES)
    file.write_bytes(file.read_bytes()[:-5])
    again = TensorBoardLogger(run)
    assert [step for _, step, _ in again.list_numbers()] == [1]
    again.finish("FINISHED")
    logger.finish("FINISHED")
