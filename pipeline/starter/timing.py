"""The rate of a pretraining on this machine, measured by a few of its steps."""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

# Its import makes the kinds of stages known to recipes.
import firstlight.pipeline.stages.sections.known  # noqa: F401
from firstlight.pipeline.config.load import load_recipe, parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.run.auto_scale import resolve_scale
from firstlight.pipeline.run.input_colours import fill_input_colours
from firstlight.pipeline.run.launching.side_processes import count_side_processes
from firstlight.pipeline.run.launching.threads import fix_threads
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics

# Steps of the trial. The first ones also allocate memory and fill the queue of batches.
NUM_STEPS, NUM_WARM_UP_STEPS = 12, 4


def measure_pretraining_rate(file: Path, num_train: int) -> float:
    """Returns the images per second that the pretraining of a first recipe takes over all seeds on this machine.

    It trains for some steps on some of the `num_train` images, in this process and in a temporary folder.

    Raises:
        UserError: the recipe or its images are not valid.
    """
    with TemporaryDirectory(prefix="firstlight-") as folder:
        asked, _ = resolve_scale(load_recipe(file))
        # Its one seed has all cores, which are no faster when several seeds share them.
        recipe = fix_threads(_shorten_recipe(asked, Path(folder), num_train), "pretrain")
        store = prepare(recipe.dataset, Path(folder) / "stores", lambda: False, lambda done, total: None)
        recipe = fill_input_colours(recipe, store, [])
        device = torch.device("cuda" if recipe.scale.worker_gpus else "cpu")
        context = StageContext.create(recipe, store, on_ray=False, device=device)
        stage = recipe.stages["pretrain"]
        instance = StageInstance("pretrain", 0, "rate", Path(folder) / "pretrain")
        stage_kind(stage).train(context, stage, instance)
        rows = read_metrics(instance.folder / METRICS_FILE)
    rates = [row["images_per_s"] for row in rows]
    rate = float(statistics.median(rates[NUM_WARM_UP_STEPS:] or rates))
    return rate * (asked.scale.max_workers or _compute_busy_share(asked))


def _compute_busy_share(recipe: Recipe) -> float:
    """Returns the share of the processes that train a seed, on average: of two with three seeds it is 3/4."""
    seeds = len(recipe.seeds)
    processes = min(count_side_processes(recipe) + 1, seeds)
    return seeds / (-(-seeds // processes) * processes)


def _shorten_recipe(recipe: Recipe, folder: Path, num_train: int) -> Recipe:
    """Returns the pretraining of a first recipe for some steps, from random weights, which take the same time."""
    raw = recipe.dump()
    stage = raw["stages"]["pretrain"]
    images = min(NUM_STEPS * stage["batch_size"], num_train)
    # A part of the images is held out.
    epochs = -(-NUM_STEPS * stage["batch_size"] // images)
    stage |= {
        "encoder": "random",
        "epochs": epochs,
        "log_every": 1,
        "watch": {},
        "keep": "last",
        "early_stopping": None,
    }
    if "rounds" in stage["method"]:
        stage["method"]["rounds"] = 1
    raw["encoder"] |= {"weights": None}
    raw["dataset"] |= {"max_train": images}
    return parse_recipe({**raw, "storage": str(folder), "stages": {"pretrain": stage}, "seeds": [0]})
