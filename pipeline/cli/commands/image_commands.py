"""The commands about images of the user's own: their arguments and options.

Each command imports its logic when it is called: `firstlight --help` needs neither torch nor MLflow.
"""

import shlex
from pathlib import Path
from typing import Any

import click

from firstlight.pipeline.cli.options import ORIGIN_OPTION, VERBOSE_OPTION, read_location
from firstlight.pipeline.cli.output import echo_text
from firstlight.pipeline.terminal import SafeConsole


@click.command("init")
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The file to write. Its name is that of the recipe.",
)
@click.option("--model", help="The network: an encoder of Firstlight, or a name of timm's.")
@click.option("--weights", help="The weights to go on from, as encoder.weights. They need --model.")
@click.option("--method", help="The objective, for example simclr.")
@click.option("--epochs", type=click.IntRange(min=1), help="The length of the pretraining.")
def init_recipe(
    images: Path, out: Path, model: str | None, weights: str | None, method: str | None, epochs: int | None
) -> None:
    """Write a recipe for your own images.

    IMAGES is a folder of images, or a file that lists them. Settings are chosen from the images and this machine,
    with a line for each; the recipe is a file to change.
    """
    from firstlight.pipeline.run.auto_scale import find_local_gpus
    from firstlight.pipeline.starter.choices import Wishes, choose_settings
    from firstlight.pipeline.starter.recipe_text import write_recipe
    from firstlight.pipeline.starter.survey import survey_images

    survey = survey_images(images)
    chosen = choose_settings(survey, Wishes(model, weights, method, epochs), find_local_gpus().count > 0)
    write_recipe(out, survey, chosen)
    echo_text("\n".join(chosen.reasons))
    echo_text(f"written; next: firstlight run {shlex.quote(str(out))}")


@click.command("look")
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("look"), show_default=True, help="The folder to write."
)
@click.option("--model", help="With --weights: the network, a name of timm's.")
@click.option("--weights", help="Compare by a network with these weights, as encoder.weights, instead of by pixels.")
@click.option(
    "--similarity",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=0.97,
    show_default=True,
    help="The least cosine of near duplicates.",
)
@click.option("--diverse", type=click.IntRange(min=1), help="The number of images of the diverse subset.")
@click.option(
    "--export",
    multiple=True,
    metavar="PROGRAM",
    help="Also write the images for embedding-atlas or fiftyone. Can be given twice.",
)
@click.option(
    "--images",
    "count",
    type=click.IntRange(min=2),
    default=20_000,
    show_default=True,
    help="The largest number of images to compare.",
)
def look_at_folder(images: Path, out: Path, count: int, **options: Any) -> None:
    """Look at your own images before you train on them.

    IMAGES is a folder of images, or a file that lists them. One page shows statistics, a map, near duplicates, likely
    leaks between train and test, odd ones out and a diverse subset; lists say what to leave out and what to take.
    """
    from firstlight.pipeline.look.look import LookRequest, look_at_images

    page = look_at_images(LookRequest(images, out, count, **options), SafeConsole(stderr=True), echo_text)
    echo_text(f"page: {page}")


@click.command("predict")
@click.argument("model", metavar="MODEL")
@click.argument("paths", nargs=-1, required=True, metavar="PATHS...")
@click.option("--out", metavar="PATH", help="The place of the predictions: predictions.parquet, .json or a folder.")
@click.option("--force", is_flag=True, help="Replace earlier predictions at --out.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images that are computed at a time.",
)
@click.option(
    "--top", type=click.IntRange(1, 20), default=3, show_default=True, help="The number of classes in the table."
)
@click.option("--split", metavar="NAME", help="The only split of a store that is predicted.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Predict on Ray with so many copies of the model; 0 is this process.",
)
@click.option("--gpus-per-worker", type=click.FloatRange(min=0.0), default=0.0, help="GPUs of each copy on Ray.")
@ORIGIN_OPTION
@VERBOSE_OPTION
def predict_images(model: str, paths: tuple[str, ...], origin: tuple[str, ...], **options: Any) -> int:
    """Predict with a fine-tuned model: classes, masks or boxes.

    MODEL is the folder `model` of a finetune stage, models:/name@alias or runs:/RUN/model. PATHS are images, folders,
    patterns such as 'photos/*.jpg', or the folder of one store. Images that cannot be read are listed, and the exit
    code is then 1.
    """
    from firstlight.pipeline.cli.predict import PredictionOptions, run_predictions

    return run_predictions(model, paths, read_location(origin), PredictionOptions(**options))
