"""The loggers by name, and the check of `tracking.loggers` before any work."""

from collections.abc import Sequence
from importlib.util import find_spec

from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.tracking.loggers.contract import RunLogger
from firstlight.pipeline.tracking.loggers.tensorboard import TensorBoardLogger
from firstlight.pipeline.tracking.loggers.wandb import WandbLogger
from firstlight.tasks.extensions.registry import Registry

LOGGERS: Registry[type[RunLogger]] = Registry(
    "loggers", {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}, RunLogger
)


def check_loggers(names: Sequence[str]) -> None:
    """Checks that the loggers of `tracking.loggers` are known, installed and usable.

    Raises:
        UserError: names `tracking.loggers`, the logger and the valid names.
    """
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"tracking.loggers: {name!r} is no logger; {suggest_valid(name, LOGGERS)}")
        logger = LOGGERS[name]
        if logger.package and find_spec(logger.package) is None:
            advice = f"pip install 'firstlight[{logger.extra}]'" if logger.extra else f"pip install {logger.package}"
            raise UserError(
                f"tracking.loggers: {name!r} needs the package {logger.package}: {advice}; {_list_usable()}"
            )
        problem = logger.find_problem()
        if problem:
            raise UserError(f"tracking.loggers: {name!r} cannot be used: {problem}; {_list_usable(name)}")


def _list_usable(without: str = "") -> str:
    usable = [
        name
        for name, logger in LOGGERS.items()
        if name != without and (not logger.package or find_spec(logger.package) is not None)
    ]
    return f"valid here: {', '.join(usable)}" if usable else "valid here: []"
