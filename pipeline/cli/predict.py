"""`firstlight predict`: predictions of a fine-tuned model for images, folders or a store, as tables and files."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from firstlight.pipeline.cli.output import echo_text
from firstlight.pipeline.config.scale import ScaleOptions, StreamOptions
from firstlight.pipeline.data.ray_data import ActorPool, TaskPool
from firstlight.pipeline.data.sources.conventions.reading import count_things
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.ray_session import RaySession, check_local_resources
from firstlight.pipeline.stages.prediction.answer_files import WRITERS, AnswerWriter, choose_output
from firstlight.pipeline.stages.prediction.answers import ImageMask, ImageObjects
from firstlight.pipeline.stages.prediction.image_items import FileImages, StoreImages, find_images
from firstlight.pipeline.stages.prediction.predictor import ItemAnswer, predict_items
from firstlight.pipeline.stages.prediction.saved_model import SavedModel, read_model
from firstlight.pipeline.terminal import Column, SafeConsole, build_table, escape_line, format_tsv
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.progress import ProgressCounter
from firstlight.pipeline.tracking.references import OpenedExperiment, fetch_reference, pin_reference

# The beginnings of a reference to a model in MLflow; anything else is a folder.
MODEL_REFERENCES = ("runs:/", "models:/")
# Rows of the table on a terminal; a pipe gets all.
MAX_TABLE_ROWS = 40
# Images that cannot be used and are named on stderr; the file has all.
MAX_REFUSED_LINES = 20
# Objects of a lower score are in the file, and not in the table.
MIN_SHOWN_SCORE = 0.5


@dataclass(frozen=True)
class PredictionOptions:
    """The options of the command. `workers`: 0 is this process, without Ray."""

    out: str | None = None
    force: bool = False
    batch_size: int = 32
    top: int = 3
    split: str | None = None
    workers: int = 0
    gpus_per_worker: float = 0.0


@contextmanager
def open_model_folder(reference: str, location: TrackingLocation) -> Iterator[Path]:
    """Yields the folder of a model: itself, or a copy of what a reference to MLflow names, until the block ends.

    Raises:
        UserError: there is none; names MODEL.
    """
    if not reference.startswith(MODEL_REFERENCES):
        folder = Path(reference)
        if not folder.is_dir():
            valid = "the folder `model` of a stage finetune, models:/<name>@<alias>, or runs:/<run>/model"
            raise UserError(f"MODEL: {reference!r} is no folder; valid: {valid}")
        yield folder
        return
    tracking = OpenedExperiment.open(location)
    pinned = pin_reference(tracking, reference, "MODEL")
    with TemporaryDirectory(prefix="firstlight-") as target:
        yield fetch_reference(tracking, pinned, Path(target), "MODEL")


def run_predictions(
    reference: str, paths: Sequence[str], location: TrackingLocation, options: PredictionOptions
) -> int:
    """Predicts for all images that `paths` name; prints a table, and writes a file. Returns the exit code.

    It is 1 if some images cannot be used.

    Raises:
        UserError: the model, a path or the output is not valid, or Ray cannot start with so many workers.
    """
    console = SafeConsole(stderr=True)
    items = find_images(paths, options.split)
    with ExitStack() as stack:
        folder = stack.enter_context(open_model_folder(reference, location))
        model = read_model(folder)
        out = choose_output(model.target, options.out, options.force)
        pool = _start_actors(stack, options, console)
        if pool is None and torch.cuda.is_available():
            model.task.to("cuda")
        with WRITERS[model.target](out, model, items, reference) as writer:
            _predict_and_print(items, model, folder, pool, writer, options, console)
    return _print_end(writer, len(items), console)


def _start_actors(stack: ExitStack, options: PredictionOptions, console: SafeConsole) -> ActorPool | None:
    """Starts Ray for the rest of the block, with the actors that hold a network each; None without workers.

    Raises:
        UserError: this machine has too few CPUs or GPUs.
    """
    if not options.workers:
        return None
    scale = ScaleOptions(name="predict", workers=options.workers, gpus_per_worker=options.gpus_per_worker)
    stream = StreamOptions()
    check_local_resources(scale, stream)
    stack.enter_context(RaySession(scale, stream, lambda line: console.print(line, markup=False))).start()
    decoding = TaskPool(stream.count_tasks(on_ray=True) * options.workers, stream.task_cpus)
    return ActorPool(options.workers, scale.cpus_per_worker, options.gpus_per_worker, decoding)


def _predict_and_print(
    items: FileImages | StoreImages,
    model: SavedModel,
    folder: Path,
    pool: ActorPool | None,
    writer: AnswerWriter,
    options: PredictionOptions,
    console: SafeConsole,
) -> None:
    """Writes the answers for all items, in order, and prints a row for each: all in a pipe, the first on a terminal."""
    is_terminal, is_cut, kept, done = sys.stdout.isatty(), False, list[tuple[str, ...]](), 0
    found = predict_items(items, model, batch_size=options.batch_size, folder=folder, pool=pool)
    with ProgressCounter(console, "predict") as progress:
        progress.show_count(0, len(items))
        while batch := list(islice(found, options.batch_size)):
            names = writer.add_answers(batch)
            done += len(batch)
            progress.show_count(done, len(items))
            rows = [
                (name, *_format_cells(item, options.top))
                for item, name in zip(batch, names, strict=True)
                if item.answer is not None
            ]
            if is_terminal:
                kept += rows[: MAX_TABLE_ROWS - len(kept)]
            elif rows and not is_cut:
                is_cut = not _print_to_pipe(format_tsv(rows))
    if is_terminal and kept:
        columns = [Column("image"), *(Column(heading) for heading in _list_headings(model, options.top))]
        table = build_table(columns, [(*map(escape_line, row), *[""] * (len(columns) - len(row))) for row in kept])
        SafeConsole().print(table)


def _print_to_pipe(text: str) -> bool:
    """Prints lines into a pipe. Returns False if nobody reads it any more: the file is written all the same."""
    try:
        echo_text(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes it once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _list_headings(model: SavedModel, top: int) -> list[str]:
    if model.target == "boxes":
        return [f"objects, score {MIN_SHOWN_SCORE:g} or more"]
    first = "class, share of the image" if model.target == "mask" else "class, probability"
    return [first, *[""] * (top - 1)]


def _format_cells(item: ItemAnswer, top: int) -> list[str]:
    """Returns the cells of an answer: classes with numbers, or how many objects of each class there are."""
    answer = item.answer
    assert answer is not None
    if isinstance(answer, ImageObjects):
        sure = answer.labels[answer.scores >= MIN_SHOWN_SCORE].tolist()
        counts = {label: sure.count(label) for label in dict.fromkeys(sure)}
        return [", ".join(f"{answer.names[label]} {count}" for label, count in counts.items()) or "none"]
    ranked = answer.rank_classes(top)
    cells = [f"{name} {100 * share:.1f} %" for name, share in ranked]
    return cells or (["nothing in view"] if isinstance(answer, ImageMask) else [])


def _print_end(writer: AnswerWriter, images: int, console: SafeConsole) -> int:
    """Prints where the predictions are, and which images could not be used. Returns the exit code."""
    refused = writer.refused
    for name, reason in refused[:MAX_REFUSED_LINES]:
        echo_text(f"not used: {escape_line(name)}: {escape_line(reason)}", err=True)
    if len(refused) > MAX_REFUSED_LINES:
        echo_text(f"not used: and {len(refused) - MAX_REFUSED_LINES:,} more", err=True)
    lines = [f"{count_things(images - len(refused), 'image')}: {writer.out}"]
    lines += [f"{count_things(len(refused), 'image')} cannot be used: {writer.refused_file}"] if refused else []
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return 1 if refused else 0
