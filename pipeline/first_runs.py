"""The functions `fl.pretrain`, `evaluate`, `finetune`, `retrieve`, `embed` and `export`: from images to results.

Each is the command of its name with `--data` and `--out`, and its arguments are spelled as the options are.
"""

from pathlib import Path
from typing import TypedDict, Unpack

from rich.console import Console

from firstlight.pipeline.api import RunResult, load_recipe, run
from firstlight.pipeline.notebook import open_console
from firstlight.pipeline.starter.choices import Wishes
from firstlight.pipeline.starter.first_run import FirstRun, write_first_run


class FirstRunArguments(TypedDict, total=False):
    """The arguments of a first run besides the images; those that are left out are chosen, with a line for each."""

    # The network: an encoder of Firstlight, or a name of timm's.
    model: str
    # Weights to go on from, as `encoder.weights`; or the `out` of an earlier run. Files of others need `model`.
    weights: str | Path
    # The objective of the pretraining, for example simclr.
    method: str
    # The length of the pretraining, in epochs or in minutes of all seeds.
    epochs: int
    minutes: float
    # True: nothing is shown. Otherwise progress is, with its rate and the time that is left: in the cell of a notebook,
    # or on stderr as the command does; or in `console`.
    quiet: bool
    console: Console


def pretrain(data: str | Path, out: str | Path, *overrides: str, **asked: Unpack[FirstRunArguments]) -> RunResult:
    """Pretrains a network on images, and scores its features where there are labels.

    Writes the recipe `out/recipe.yaml` first. Where it exists and was written for the same, the run goes on.

    Args:
        data: a folder of images, or a file that lists them.
        out: the folder of the recipe, the images' store and all results.
        overrides: texts `key=value` with keys of the recipe, as on the command line.
        asked: `model`, `weights`, `method`, `epochs` or `minutes`, `quiet`: see `FirstRunArguments`.

    Raises:
        UserError: a mistake that the user can correct, found before the work starts where possible.
        StopTraining, StageFailed, Unpublished: as `run`.
    """
    return _run_first("pretrain", data, out, overrides, asked)


def evaluate(data: str | Path, out: str | Path, *overrides: str, **asked: Unpack[FirstRunArguments]) -> RunResult:
    """Scores the features of `weights`, or of a network pretrained on the images, by kNN and a linear probe.

    Arguments and errors are those of `pretrain`. The images need labels.
    """
    return _run_first("evaluate", data, out, overrides, asked)


def finetune(data: str | Path, out: str | Path, *overrides: str, **asked: Unpack[FirstRunArguments]) -> RunResult:
    """Fine-tunes `weights`, or a network pretrained on the images, with few of their labels, beside scratch.

    Arguments and errors are those of `pretrain`. The images need labels.
    """
    return _run_first("finetune", data, out, overrides, asked)


def retrieve(data: str | Path, out: str | Path, *overrides: str, **asked: Unpack[FirstRunArguments]) -> RunResult:
    """Writes an index of the images' features, by `weights` or a network pretrained on them, for `open_index`.

    Arguments and errors are those of `pretrain`.
    """
    return _run_first("retrieve", data, out, overrides, asked)


def embed(data: str | Path, out: str | Path, *overrides: str, **asked: Unpack[FirstRunArguments]) -> RunResult:
    """Writes the embeddings of the images, by `weights` or a network pretrained on them, for `open_embeddings`.

    Arguments and errors are those of `pretrain`.
    """
    return _run_first("embed", data, out, overrides, asked)


def export(data: str | Path, out: str | Path, *overrides: str, **asked: Unpack[FirstRunArguments]) -> RunResult:
    """Exports `weights`, or a network pretrained on the images, for other software, with a model card.

    Arguments and errors are those of `pretrain`.
    """
    return _run_first("export", data, out, overrides, asked)


def _run_first(
    goal: str, data: str | Path, out: str | Path, overrides: tuple[str, ...], asked: FirstRunArguments
) -> RunResult:
    if unknown := sorted(asked.keys() - FirstRunArguments.__annotations__.keys()):
        raise TypeError(f"{goal}: {unknown[0]!r} is no argument; valid: {', '.join(FirstRunArguments.__annotations__)}")
    weights = asked.get("weights")
    wishes = Wishes(
        asked.get("model"), None if weights is None else str(weights), asked.get("method"), asked.get("epochs"), goal
    )
    request = FirstRun(Path(data), Path(out), wishes, asked.get("minutes"))
    with open_console(asked.get("console"), asked.get("quiet", False)) as console:
        file = write_first_run(request, lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
        return run(load_recipe(file, *overrides), console=console)
