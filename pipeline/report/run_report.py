"""The page of a recipe's run: what was run, on which data, what it was worth, what was seen on the way, and how to do it again."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.recipe import Dataset, Downstream, Finetune, Pretrain, Recipe, Training
from firstlight.pipeline.data.parquet import parquet_table
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.data.store import DAMAGE, QUARANTINE, Store
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.report.html_page import (
    Bars,
    Block,
    Cell,
    Facts,
    Fold,
    Gallery,
    Group,
    Notes,
    Page,
    Picture,
    Section,
    Table,
    Text,
    Tone,
    Tree,
    date,
    duration,
    public,
    render,
)
from firstlight.pipeline.report.score_table import Row, cells, headings, title
from firstlight.pipeline.report.timings import PARTS, notes, shares, timings
from firstlight.pipeline.run import data_checks
from firstlight.pipeline.stages.stage import Instance, code_version
from firstlight.pipeline.tracking.client import run_of
from firstlight.pipeline.tracking.figures import pictures
from firstlight.pipeline.train.attempts import read_attempts
from firstlight.pipeline.train.context import Worker
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.pretrain import METHODS

FILE, RECIPE = "report.html", "recipe.yaml"
SUMMARY = "summary"  # folder of the pictures of the whole run
LISTED = 10  # images that cannot be decoded

TONES: dict[str, Tone] = {"helps": "good", "hurts": "bad"}
SENTENCE = {"helps": "helps", "hurts": "hurts", "no clear difference": "makes no clear difference"}
HEADS = {"pretraining": "verdict", "without": "against", "difference": "above paper"}


@dataclass(frozen=True)
class Ran:
    """What there is to tell. `instances`: of all stages that are known so far; `references`: of encoders from elsewhere, by stage."""

    worker: Worker
    folder: Path
    instances: Sequence[Instance]
    rows: Sequence[Row]
    references: dict[str, str]
    parent: str | None  # its MLflow run
    prepared: Path  # the folder of the prepare stage
    uri: str
    error: str | None = None

    @property
    def recipe(self) -> Recipe:
        return self.worker.recipe

    def of(self, stage: str) -> list[Instance]:
        return [instance for instance in self.instances if instance.stage == stage]


def write(ran: Ran) -> Path:
    """Write the page, and the recipe that repeats the run, into its folder."""
    write_atomically(ran.folder / RECIPE, yaml_reader.dump(ran.recipe.dump()).encode())
    file = ran.folder / FILE
    write_atomically(file, render(page(ran)).encode())
    return file


def told(error: BaseException) -> str:
    """What a page says of the error that ended a run."""
    if isinstance(error, KeyboardInterrupt):
        return "The run was stopped from outside; the same command goes on with it."
    return " ".join(str(error).split()) or type(error).__name__


def page(ran: Ran) -> Page:
    recipe = ran.recipe
    status, tone = _status(ran)
    sections = [
        Section("Results", _results(ran)),
        Section("Warnings and notes", _warnings(ran)),
        Section("Stages", [_stage(ran, name) for name in recipe.stages]),
        Section("Data", about_data(recipe.dataset, ran.worker.store, ran.worker.splits, ran.prepared)),
        Section("Time", _time(ran)),
        Section("Lineage", [_lineage(ran)]),
        Section("What was run", _what(ran)),
        Section("Run it again", _again(ran)),
    ]
    foot = f"Written by Firstlight on {date(time.time())}. Everything on this page is also in MLflow: {public(ran.uri)}"
    return Page(recipe.name, "Firstlight, a run of a recipe", recipe.description, sections, status, tone, foot)


def _status(ran: Ran) -> tuple[str, Tone]:
    wanted = len(ran.recipe.stages) * len(ran.recipe.seeds)
    done = sum(instance.result is not None for instance in ran.instances)
    if ran.error is not None:
        return f"stopped: {done} of {wanted} parts done", "bad"
    return ("finished", "good") if done == wanted else (f"{done} of {wanted} parts done", "unsure")


def _results(ran: Ran) -> list[Block]:
    out: list[Block] = [Notes([ran.error], "error")] if ran.error is not None else []
    if not ran.rows:
        return [*out, Text("Nothing is measured yet.", "quiet")]
    if verdict := _verdict([row.verdict for row in ran.rows if row.baseline]):
        out.append(Text(verdict))
    out.append(score_table(ran.recipe, ran.rows))
    if any(row.baseline for row in ran.rows) and len(ran.recipe.seeds) > 1:
        out.append(
            Text(
                "“Helps” and “hurts” need all seeds to agree, and a mean gain of more than twice its standard error.",
                "quiet",
            )
        )
    return [*out, *gallery(ran.folder / SUMMARY)]


def score_table(recipe: Recipe, rows: Sequence[Row]) -> Table:
    """The table at the end of a run."""
    heads = [heading for heading in headings(recipe) if heading not in ("stage", "without")]
    lines = [[_cell(heading, cells(recipe, row)) for heading in heads] for row in rows]
    numbers = [k for k, heading in enumerate(heads) if heading not in ("measure", "pretraining")]
    return Table(title(recipe).capitalize(), [HEADS.get(heading, heading) for heading in heads], lines, numbers)


def _verdict(verdicts: Sequence[str]) -> str:
    """The table in a sentence; "" where nothing has a baseline."""
    counts = Counter(verdicts)
    told = [f"{does} in {counts[verdict]}" for verdict, does in SENTENCE.items() if counts[verdict]]
    if not told:
        return "There is one seed, so there is no verdict." if verdicts else ""
    return f"Beside the same network without it, pretraining {', '.join(told)} of {len(verdicts)} measures."


def _cell(heading: str, shown: dict[str, str]) -> Cell:
    tone: Tone = TONES.get(shown[heading], "unsure") if heading == "pretraining" and shown[heading] else ""
    return Cell(shown[heading], tone, {"measure": shown["stage"], "baseline": shown["without"]}.get(heading, ""))


def _warnings(ran: Ran) -> list[Block]:
    left_out = [
        line for name in ran.recipe.stages for line in data_checks.left_out(ran.recipe, name, ran.worker.splits)
    ]
    lines = [*data_checks.wrong_with(ran.recipe, ran.worker.store), *left_out, *notes(ran.instances)]
    return [Notes(lines)] if lines else [Text("None.", "quiet")]


def _stage(ran: Ran, name: str) -> Group:
    stage, mine = ran.recipe.stages[name], ran.of(name)
    blocks: list[Block] = [Facts(list(_told(ran, name)))]
    shown = [instance for instance in mine if pictures(instance.folder)]
    waiting = [
        seed
        for seed in ran.recipe.seeds
        if seed not in [instance.seed for instance in mine if instance.result is not None]
    ]
    if waiting:
        blocks.append(
            Text(f"Not finished: seed{'s' if len(waiting) > 1 else ''} {', '.join(map(str, waiting))}.", "quiet")
        )
    if shown:
        blocks += [Text(f"Pictures of seed {shown[0].seed}", "quiet"), *gallery(shown[0].folder)]
    blocks += [Fold(f"Pictures of seed {instance.seed}", gallery(instance.folder)) for instance in shown[1:]]
    if isinstance(stage, Pretrain):
        method = METHODS[stage.method.name]
        blocks.append(
            Fold(
                "Known differences from the paper, and what it does not give",
                [Text(line) for line in method.deviations],
            )
        )
    blocks.append(Fold("Settings", [Text(public(yaml_reader.dump(stage.model_dump(mode="json"))), "code")]))
    return Group(name if name == stage.kind else f"{name} ({stage.kind})", blocks)


def _told(ran: Ran, name: str) -> Iterator[tuple[str, str]]:
    """What a reader wants to know of a stage before its pictures."""
    stage, done = ran.recipe.stages[name], [i.result for i in ran.of(name) if i.result is not None]
    if isinstance(stage, Pretrain):
        method = METHODS[stage.method.name]
        yield "method", method.title
        yield "paper", method.paper
    if isinstance(stage, Finetune):
        task = TASKS[stage.task.name]
        yield "task", f"{stage.task.name}, scored by {task.measure.replace('_', ' ')}"
        for arm in stage.arms if done else ():
            rates = ", ".join(f"{result[arm]['lr']:g}" for result in done)
            yield arm, f"learning rate {rates}, chosen on held-out images" + (", by seed" if len(done) > 1 else "")
    if isinstance(stage, Training):
        images = next((result.get("images", result.get("labels")) for result in done), None)
        seen = f"{images:,} images, " if images else ""
        yield (
            "training",
            f"{seen}{stage.epochs} epochs of batches of {stage.batch_size}, {stage.optimizer.name} at {stage.optimizer.lr:g}",
        )
    if isinstance(stage, Downstream) and stage.takes_encoder:
        yield "encoder", "of the pretraining before it" if stage.encoder == "previous" else stage.encoder


def gallery(folder: Path) -> list[Block]:
    found = [Picture(file, entry.title, entry.alt) for file, entry in pictures(folder)]
    return [Gallery(found)] if found else []


def about_data(data: Dataset, store: Store, splits: Splits, prepared: Path) -> list[Block]:
    """`prepared`: the folder of the prepare stage, for its pictures."""
    copies = store.images["duplicates"]
    facts = [
        ("data set", f"{data.name} ({store.source.get('kind', data.source)})"),
        (
            "images",
            f"{len(splits.train):,} to train on, {len(splits.val):,} held out of these, {len(splits.test):,} to test on",
        ),
        ("size", f"{data.image_size} x {data.image_size} pixels, as the networks see them"),
        ("classes", f"{len(store.classes):,}" if store.classes else "none: no labels"),
        ("cannot be decoded", f"{store.quarantined:,} images"),
        (
            "copies",
            f"{copies['copies']:,} images, {copies['of_train_in_test']:,} of them test images that are also in train",
        ),
        ("store", str(store.path)),
        ("sha256", store.hash),
    ]
    return [Facts(facts), *_quarantined(store.path / QUARANTINE), *gallery(prepared)]


def _quarantined(file: Path) -> list[Block]:
    try:
        rows = parquet_table(file).to_pylist()
    except DAMAGE:
        return []
    if not rows:
        return []
    shown = [[str(row["path"]), str(row["split"]), str(row["reason"])] for row in rows[:LISTED]]
    return [
        Fold(
            f"{len(rows):,} images that cannot be decoded",
            [Table(f"The first {len(shown)}", ("path", "split", "reason"), shown)],
        )
    ]


def _time(ran: Ran) -> list[Block]:
    batch_sizes = {name: stage.batch_size for name, stage in ran.recipe.stages.items() if isinstance(stage, Training)}
    found = timings(ran.instances, batch_sizes)
    if not found:
        return []
    used = [part for part in PARTS if any(part in timing.parts for timing in found)]
    bars = Bars(
        "Wall time of each stage and seed, and where it went",
        PARTS,
        [(t.label, duration(t.seconds), shares(t)) for t in found],
    )
    lines = [
        [t.label, duration(t.seconds), *(f"{t.parts[part]:.1f}" if part in t.parts else "" for part in used)]
        for t in found
    ]
    table = Table("Seconds of worker 0", ["stage", "all", *used], lines, range(1, 2 + len(used)))
    return [bars, Fold("In seconds", [table])]


def _lineage(ran: Ran) -> Tree:
    """From the store to the last stage, with the MLflow run of each."""
    origins = [
        _branch(ran, instance) for instance in ran.instances if isinstance(ran.recipe.stages[instance.stage], Pretrain)
    ]
    fresh = [
        Tree(i.label, _run(i.folder))
        for i in ran.instances
        if i.encoder is None and isinstance(ran.recipe.stages[i.stage], Downstream)
    ]
    elsewhere = [
        Tree("encoder from elsewhere", reference, [Tree(i.label, _run(i.folder)) for i in ran.of(stage)])
        for stage, reference in ran.references.items()
    ]
    store = Tree(f"store {ran.worker.store.path.name}", _run(ran.prepared), [*origins, *fresh])
    return Tree(ran.recipe.name, f"run {ran.parent}" if ran.parent else "", [store, *elsewhere])


def _branch(ran: Ran, pretrained: Instance) -> Tree:
    after = [i for i in ran.instances if i.encoder == pretrained.folder / "encoder"]
    return Tree(pretrained.label, _run(pretrained.folder), [Tree(i.label, _run(i.folder)) for i in after])


def _run(folder: Path) -> str:
    """The MLflow run of a folder, "" where it has none."""
    run_id = run_of(folder)
    return f"run {run_id}" if run_id else ""


def _what(ran: Ran) -> list[Block]:
    recipe = ran.recipe
    works = [work for instance in ran.instances if (work := read_attempts(instance.folder)) is not None]
    facts = [
        ("recipe", recipe.name),
        ("seeds", ", ".join(map(str, recipe.seeds))),
        ("stages", ", ".join(recipe.stages)),
        ("encoder", ", ".join(f"{key}: {value}" for key, value in recipe.encoder.model_dump(mode="json").items())),
    ]
    if works:
        again = sum(work.attempts - 1 for work in works)
        ended = [work.ended for work in works if work.ended is not None]
        facts += [
            ("begun", date(min(work.began for work in works))),
            ("ended", date(max(ended)) if ended else "not yet"),
            (
                "work",
                duration(sum(work.seconds for work in works))
                + (f", taken up again {again} time{'s' if again > 1 else ''}" if again else ""),
            ),
            *_machine(works[0].machine),
        ]
    return [Facts([*facts, ("code", code_version()), ("MLflow", public(ran.uri)), ("files", str(ran.folder))])]


def _machine(machine: dict[str, Any]) -> list[tuple[str, str]]:
    workers = f"{machine['workers']} of {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return [
        ("machine", f"{machine['host']}: {machine['cpus']} CPUs, {machine['system']}"),
        ("device", f"{machine['device']}, workers: {workers}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
    ]


def _again(ran: Ran) -> list[Block]:
    return [
        Text("The same command goes on where a run was stopped. To repeat it from nothing, give it another name:"),
        Text(f"cd {Path.cwd()}\nfirstlight run {ran.folder / RECIPE} name={ran.recipe.name}-again", "code"),
        Text("Its images and models, in MLflow:"),
        Text(f"mlflow ui --backend-store-uri {public(ran.uri)}", "code"),
        Fold("The recipe, resolved", [Text(public(yaml_reader.dump(ran.recipe.dump())), "code")]),
    ]
