"""The recipe of a run that is asked for in one line: images, a goal, and where everything goes."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.run.auto_scale import find_local_gpus
from firstlight.pipeline.stages.artifacts.weights_origin import TRACKED_PREFIXES
from firstlight.pipeline.starter.choices import ChosenSettings, Wishes, choose_settings
from firstlight.pipeline.starter.recipe_text import format_recipe, name_recipe
from firstlight.pipeline.starter.survey import ImageSurvey, survey_images
from firstlight.pipeline.starter.timing import measure_pretraining_rate
from firstlight.tasks.nn.weights.weight_sources import find_weights

# The recipe of a first run, in its folder.
FIRST_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class FirstRun:
    """Images, a folder for everything that is made of them, and what the user asks for.

    `minutes` is how long the pretraining may take over all seeds, instead of `wishes.epochs`.
    """

    data: Path
    out: Path
    wishes: Wishes
    minutes: float | None = None

    @property
    def command(self) -> str:
        """The command that asks for the same."""
        wishes = self.wishes
        options = {
            "data": self.data.resolve(),
            "out": self.out.resolve(),
            "model": wishes.model,
            "weights": wishes.weights,
            "method": wishes.method,
            "epochs": wishes.epochs,
            "minutes": None if self.minutes is None else f"{self.minutes:g}",
        }
        stated = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        return shlex.join(["firstlight", str(wishes.goal), *stated])


def write_first_run(asked: FirstRun, tell: Callable[[str], None]) -> Path:
    """Writes the recipe of a first run into its folder, and returns the file. `tell` gets each line about it.

    The recipe of an earlier run that asked for the same is kept, so that the run is continued.

    Raises:
        UserError: a wish is not valid, its weights cannot be had, or the folder has the recipe of something else.
    """
    wishes = asked.wishes
    if asked.minutes is not None and wishes.epochs is not None:
        raise UserError("--minutes: cannot be combined with --epochs; valid: one of them")
    of_pretraining = {"method": wishes.method, "epochs": wishes.epochs, "minutes": asked.minutes}
    stated = [name for name, value in of_pretraining.items() if value is not None]
    if stated and not wishes.pretrains:
        raise UserError(
            f"--{stated[0]}: is not valid: {wishes.goal} with --weights pretrains nothing; valid: leave it out, "
            "or firstlight pretrain"
        )
    file, first_line = asked.out / FIRST_RECIPE, f"# {asked.command}\n"
    if file.exists():
        if file.read_text("utf-8").startswith(first_line):
            tell(f"recipe: {file}, as before")
            return file
        raise UserError(
            f"--out: {asked.out} has a recipe of something else, {file}; valid: another folder, or firstlight run "
            f"{shlex.quote(str(file))}"
        )
    survey, has_gpu = survey_images(asked.data), find_local_gpus().count > 0
    chosen = choose_settings(survey, wishes, has_gpu)
    _check_weights(chosen)
    file.parent.mkdir(parents=True, exist_ok=True)
    if asked.minutes is not None:
        chosen = _choose_for_minutes(asked, survey, chosen, has_gpu)
    _write(file, first_line, survey, chosen, asked)
    for line in (*chosen.reasons, f"recipe: {file}"):
        tell(line)
    return file


def _check_weights(chosen: ChosenSettings) -> None:
    """Checks that the weights are there or can be downloaded, before anything is measured or written."""
    weights = chosen.encoder.get("weights")
    if weights is None or weights.startswith(TRACKED_PREFIXES):
        return
    try:
        find_weights(weights, chosen.encoder)
    except ValueError as error:
        raise UserError(f"--weights: {error}") from None


def _choose_for_minutes(asked: FirstRun, survey: ImageSurvey, chosen: ChosenSettings, has_gpu: bool) -> ChosenSettings:
    """Returns the settings with as many epochs as the minutes allow, by the rate of a short trial."""
    assert asked.minutes is not None
    trial = asked.out / f".{FIRST_RECIPE}"
    _write(trial, "", survey, chosen, asked)
    try:
        rate = measure_pretraining_rate(trial, survey.num_train)
    finally:
        trial.unlink()
    epoch_minutes = survey.num_train * len(chosen.seeds) / rate / 60
    epochs = max(int(asked.minutes / epoch_minutes), 1)
    chosen = choose_settings(survey, replace(asked.wishes, epochs=epochs), has_gpu)
    *others, length = chosen.reasons
    spent = f"{length}: about {max(epochs * epoch_minutes, 0.1):.1f} minutes at {rate:,.0f} images/s"
    return replace(chosen, reasons=(*others, spent))


def _write(file: Path, first_line: str, survey: ImageSurvey, chosen: ChosenSettings, asked: FirstRun) -> None:
    name = name_recipe(asked.out.resolve())
    text = format_recipe(name, survey, chosen, storage=str(asked.out.resolve()))
    write_atomically(file, (first_line + text).encode())
