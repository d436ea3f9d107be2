"""`firstlight look`: images -> a page, and lists of what to leave out and of what to take."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS
from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.prepare.shared_format import ProbedImage, SharedFormat, find_shared_format, probe_images
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.data.sources.conventions.split_names import SPLITS
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.look.atlas_export import write_atlas_table
from firstlight.pipeline.look.fiftyone_export import write_fiftyone_dataset
from firstlight.pipeline.look.findings import find_all
from firstlight.pipeline.look.image_lists import ImageLister
from firstlight.pipeline.look.look_page import LookFacts, describe_findings, render_look
from firstlight.pipeline.look.pixel_features import describe_pixel_features, embed_pixels
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.embed import EMBEDDINGS_FOLDER, open_embeddings, read_embeddings_manifest
from firstlight.pipeline.starter.choices import Wishes
from firstlight.pipeline.starter.first_run import FirstRun, write_first_run
from firstlight.pipeline.starter.own_encoder import find_own_encoder
from firstlight.pipeline.starter.survey import check_readable, name_dataset, read_dataset_options, select_sampled
from firstlight.pipeline.terminal import SafeConsole, format_count
from firstlight.pipeline.tracking.progress import ProgressCounter

LOOK_PAGE = "look.html"
NEAR_FILE, UNIQUE_FILE, DIVERSE_FILE = "near_duplicates.csv", "unique.csv", "diverse.csv"
# The shorter side of the images that are kept where no network sees them, in pixels.
KEPT_SIDE = 96
# A split that the images do not have is not drawn: everything is looked at.
WHOLE = {"image_size": 32, "test_fraction": 0.0}
# Images that are tried at most to find out whether they are to be read as colours.
NUM_TRIED = 20
# Images that are listed as odd.
NUM_ODD = 36
# Functions that write the images for another program into a folder, by the name of the program, and return a line that
# says how to open them.
EXPORTS: dict[str, Callable[[LookFacts, Path], str]] = {
    "embedding-atlas": write_atlas_table,
    "fiftyone": write_fiftyone_dataset,
}


@dataclass(frozen=True)
class LookRequest:
    """Images, a folder for what is made of them, and options.

    `images`: the most images that are compared, evenly spaced ones of more. `similarity`: the least cosine of near
    duplicates. `diverse`: the number of images of the diverse subset; None: a tenth of those to train on, up to 1,000.
    `model`, `weights`: of a network that gives the features, as for a first run; None: pixels do. `export`: the
    programs of `EXPORTS` that are to open the images, too.
    """

    data: Path
    out: Path
    images: int = 20_000
    similarity: float = 0.97
    diverse: int | None = None
    model: str | None = None
    weights: str | None = None
    export: tuple[str, ...] = ()


def look_at_images(asked: LookRequest, console: SafeConsole, tell: Callable[[str], None]) -> Path:
    """Writes the page and the lists of a look, and returns the file of the page. `tell` gets a line for each finding.

    Raises:
        UserError: there are no such images, weights or exports, or the folder has something else.
    """
    for name in asked.export:
        if name not in EXPORTS:
            raise UserError(f"--export: {name!r} is unknown; {suggest_valid(name, EXPORTS)}")
    if asked.weights is None and asked.model is not None:
        raise UserError("--model: needs --weights; valid: both, or neither, and pixels are compared")
    if asked.weights is None:
        store, ids, features = _read_pixels(asked, console)
        text = describe_pixel_features(store)
    else:
        store, ids, features = _embed_by_network(asked, console)
        text = f"a network with the weights {asked.weights}"
    kept = select_evenly_spaced(np.arange(len(ids)), asked.images)
    ids, features = ids[kept], features[kept]
    split_of = {
        image_id: split for split in SPLITS if store.splits.get(split) for image_id in store.ids(split).tolist()
    }
    count = asked.diverse or min(max(store.splits["train"] // 10, 1), 1000)
    findings = find_all(ids, features, split_of, asked.similarity, NUM_ODD, count)
    lister = ImageLister(store, asked.data, ids)
    lister.write_pairs(asked.out / NEAR_FILE, findings.near_duplicates)
    train = [image_id for image_id in ids.tolist() if split_of[image_id] == "train"]
    lister.write_list(asked.out / UNIQUE_FILE, [image_id for image_id in train if image_id not in findings.redundant])
    lister.write_list(asked.out / DIVERSE_FILE, findings.diverse)
    facts = LookFacts(
        asked.data,
        store,
        ids,
        features,
        text,
        asked.similarity,
        findings,
        lister,
        asked.out / UNIQUE_FILE,
        asked.out / DIVERSE_FILE,
    )
    page = asked.out / LOOK_PAGE
    write_atomically(page, render_look(facts).encode())
    for line in describe_findings(facts):
        tell(line)
    for name in dict.fromkeys(asked.export):
        tell(f"{name}: {EXPORTS[name](facts, asked.out)}")
    return page


def _read_pixels(asked: LookRequest, console: SafeConsole) -> tuple[Store, np.ndarray, np.ndarray]:
    source, shared = _list_images(asked.data)
    kept = {"store_size": KEPT_SIDE} if shared is None else shared.pixels.dump()
    options = read_dataset_options({**name_dataset(asked.data), **WHOLE, **kept})
    asked.out.mkdir(parents=True, exist_ok=True)
    with ProgressCounter(console, "prepare") as progress:
        store = prepare(options, asked.out / "stores", lambda: False, progress.show_count, source=source)
    if not store.splits.get("train"):
        raise UserError(f"{asked.data}: has no training images")
    ids = select_evenly_spaced(np.sort(np.concatenate([store.ids(split) for split in store.splits])), asked.images)
    with ProgressCounter(console, "compare") as progress:
        return store, ids, embed_pixels(store, ids, progress.show_count)


def _list_images(location: Path) -> tuple[Source, SharedFormat | None]:
    """Lists the images, and returns the format that they share if they cannot be read as colours."""
    source = open_source(read_dataset_options({**name_dataset(location), **WHOLE}))
    probed = list[ProbedImage]()
    # No other image is tried if the first can be read as colours, as most can.
    for image in probe_images(source, select_sampled(source, NUM_TRIED)):
        probed.append(image)
        if image.is_colour:
            break
    check_readable(probed, location)
    return source, find_shared_format(probed)


def _check_network_channels(asked: LookRequest) -> None:
    """Checks that weights are of a network for the channels of the images: nobody can state its normalisation here."""
    assert asked.weights is not None
    own, (_, shared) = find_own_encoder(asked.weights), _list_images(asked.data)
    channels = own.channels if own is not None else RGB_PIXELS.channels
    if shared is not None and channels != shared.pixels.channels:
        raise UserError(
            f"--weights: {asked.weights} is not valid, since its network takes {format_count(channels, 'channel')}, "
            f"and the images have {shared.pixels}; valid: the --out of a pretraining on such images, or leave it out, "
            "and pixels are compared"
        )


def _embed_by_network(asked: LookRequest, console: SafeConsole) -> tuple[Store, np.ndarray, np.ndarray]:
    _check_network_channels(asked)
    wishes = Wishes(model=asked.model, weights=asked.weights, goal="embed")
    file = write_first_run(
        FirstRun(asked.data, asked.out, wishes),
        lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    (instance,) = run_recipe(load_recipe(file), console).instances
    folder = instance.folder / EMBEDDINGS_FOLDER
    ids, vectors = open_embeddings(folder)
    order = np.argsort(ids)
    wanted = read_embeddings_manifest(folder)[0]["store"]
    stores = (Store.open(path) for path in (asked.out / "stores").iterdir() if (path / MANIFEST_FILE).exists())
    return next(store for store in stores if store.hash == wanted), ids[order], vectors[order].astype(np.float32)
