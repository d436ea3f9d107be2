"""The page of a recipe's run: what was run, on which data, what it was worth, what was seen on the way, and how to do it again."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.report import data_notes
from firstlight.pipeline.report.html_page import (
    Bars,
    Block,
    Facts,
    Fold,
    Group,
    Page,
    Section,
    Table,
    Text,
    Tone,
    Tree,
    date,
    public,
    render,
)
from firstlight.pipeline.report.page_parts import (
    RECIPE_FILE,
    REPORT_FILE,
    SUMMARY_FOLDER,
    data_blocks,
    describe_run,
    error_blocks,
    figure_blocks,
    footer_text,
    mlflow_blocks,
    resolved_block,
    score_block,
    warning_blocks,
)
from firstlight.pipeline.report.timings import PARTS, notes, shares, timings
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.terminal import format_duration
from firstlight.pipeline.tracking.figures import pictures
from firstlight.pipeline.train.attempts import read_attempts
from firstlight.pipeline.train.context import StageContext

SENTENCE = {"helps": "helps", "hurts": "hurts", "no clear difference": "makes no clear difference"}


@dataclass(frozen=True)
class Ran:
    """What there is to tell. `instances`: of all stages that are known so far; `references`: of encoders from elsewhere, by stage."""

    worker: StageContext
    folder: Path
    instances: Sequence[StageInstance]
    rows: Sequence[ScoreRow]
    references: dict[str, str]
    parent: str | None  # its MLflow run
    prepared: Path  # the folder of the prepare stage
    uri: str
    error: str | None = None

    @property
    def recipe(self) -> Recipe:
        return self.worker.recipe

    def of(self, stage: str) -> list[StageInstance]:
        return [instance for instance in self.instances if instance.stage == stage]


def write(ran: Ran) -> Path:
    """Write the page, and the recipe that repeats the run, into its folder."""
    write_atomically(ran.folder / RECIPE_FILE, yaml_reader.dump_yaml(ran.recipe.dump()).encode())
    file = ran.folder / REPORT_FILE
    write_atomically(file, render(page(ran)).encode())
    return file


def page(ran: Ran) -> Page:
    recipe = ran.recipe
    status, tone = _status(ran)
    sections = [
        Section("Results", _results(ran)),
        Section("Warnings and notes", _warnings(ran)),
        Section("Stages", [_stage(ran, name) for name in recipe.stages]),
        Section("Data", data_blocks(recipe.dataset, ran.worker.store, ran.worker.splits, ran.prepared)),
        Section("Time", _time(ran)),
        Section("Lineage", [_lineage(ran)]),
        Section("What was run", _what(ran)),
        Section("Run it again", _again(ran)),
    ]
    foot = footer_text(ran.uri)
    return Page(recipe.name, "Firstlight, a run of a recipe", recipe.description, sections, status, tone, foot)


def _status(ran: Ran) -> tuple[str, Tone]:
    wanted = len(ran.recipe.stages) * len(ran.recipe.seeds)
    done = sum(instance.result is not None for instance in ran.instances)
    if ran.error is not None:
        return f"stopped: {done} of {wanted} parts done", "bad"
    return ("finished", "good") if done == wanted else (f"{done} of {wanted} parts done", "unsure")


def _results(ran: Ran) -> list[Block]:
    out = error_blocks(ran.error)
    if not ran.rows:
        return [*out, Text("Nothing is measured yet.", "quiet")]
    if verdict := _verdict([row.verdict for row in ran.rows if row.baseline]):
        out.append(Text(verdict))
    out.append(score_block(ran.recipe, ran.rows))
    if any(row.baseline for row in ran.rows) and len(ran.recipe.seeds) > 1:
        out.append(
            Text(
                "“Helps” and “hurts” need all seeds to agree, and a mean gain of more than twice its standard error.",
                "quiet",
            )
        )
    return [*out, *figure_blocks(ran.folder / SUMMARY_FOLDER)]


def _verdict(verdicts: Sequence[str]) -> str:
    """The table in a sentence; "" where nothing has a baseline."""
    counts = Counter(verdicts)
    told = [f"{does} in {counts[verdict]}" for verdict, does in SENTENCE.items() if counts[verdict]]
    if not told:
        return "There is one seed, so there is no verdict." if verdicts else ""
    return f"Beside the same network without it, pretraining {', '.join(told)} of {len(verdicts)} measures."


def _warnings(ran: Ran) -> list[Block]:
    left_out = [
        line for name in ran.recipe.stages for line in data_notes.describe_left_out(ran.recipe, name, ran.worker.splits)
    ]
    lines = [*data_notes.describe_problems(ran.recipe, ran.worker.store), *left_out, *notes(ran.instances)]
    return warning_blocks(lines)


def _stage(ran: Ran, name: str) -> Group:
    stage, mine = ran.recipe.stages[name], ran.of(name)
    blocks: list[Block] = [Facts(list(_describe_stage(ran, name)))]
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
        blocks += [Text(f"Pictures of seed {shown[0].seed}", "quiet"), *figure_blocks(shown[0].folder)]
    blocks += [Fold(f"Pictures of seed {instance.seed}", figure_blocks(instance.folder)) for instance in shown[1:]]
    if lines := stage_kind(stage).deviations(stage):
        title = "Known differences from the paper, and what it does not give"
        blocks.append(Fold(title, [Text(line) for line in lines]))
    blocks.append(Fold("Settings", [Text(public(yaml_reader.dump_yaml(stage.model_dump(mode="json"))), "code")]))
    return Group(name if name == stage.kind else f"{name} ({stage.kind})", blocks)


def _describe_stage(ran: Ran, name: str) -> Iterator[tuple[str, str]]:
    """Yields names and values that a reader wants to know of a stage before its pictures."""
    stage, results = ran.recipe.stages[name], [i.result for i in ran.of(name) if i.result is not None]
    yield from stage_kind(stage).describe(stage, results)
    if isinstance(stage, TrainingOptions):
        images = next((result.get("images", result.get("labels")) for result in results), None)
        trained_on = f"{images:,} images, " if images else ""
        yield (
            "training",
            f"{trained_on}{stage.epochs} epochs of batches of {stage.batch_size}, "
            f"{stage.optimizer.name} at {stage.optimizer.lr:g}",
        )
    source = ran.recipe.encoder_source(name)
    if source is not None:
        yield "encoder", source.reference or f"of the stage {source.stage}, before it"


def _time(ran: Ran) -> list[Block]:
    batch_sizes: dict[str, int] = {}
    for name, stage in ran.recipe.stages.items():
        if isinstance(stage, TrainingOptions):
            batch_sizes[name] = stage.batch_size
    found = timings(ran.instances, batch_sizes)
    if not found:
        return []
    used = [part for part in PARTS if any(part in timing.parts for timing in found)]
    bars = Bars(
        "Wall time of each stage and seed, and where it went",
        PARTS,
        [(t.label, format_duration(t.seconds), shares(t)) for t in found],
    )
    lines = [
        [t.label, format_duration(t.seconds), *(f"{t.parts[part]:.1f}" if part in t.parts else "" for part in used)]
        for t in found
    ]
    table = Table("Seconds of worker 0", ["stage", "all", *used], lines, range(1, 2 + len(used)))
    return [bars, Fold("In seconds", [table])]


def _lineage(ran: Ran) -> Tree:
    """From the store to the last stage, with the MLflow run of each."""
    origins = [
        _branch(ran, instance) for instance in ran.instances if ran.recipe.stages[instance.stage].makes_encoder
    ]
    fresh = [
        Tree(i.label, describe_run(i.folder))
        for i in ran.instances
        if i.encoder is None and not ran.recipe.stages[i.stage].makes_encoder
    ]
    elsewhere = [
        Tree("encoder from elsewhere", reference, [Tree(i.label, describe_run(i.folder)) for i in ran.of(stage)])
        for stage, reference in ran.references.items()
    ]
    store = Tree(f"store {ran.worker.store.path.name}", describe_run(ran.prepared), [*origins, *fresh])
    return Tree(ran.recipe.name, f"run {ran.parent}" if ran.parent else "", [store, *elsewhere])


def _branch(ran: Ran, pretrained: StageInstance) -> Tree:
    after = [i for i in ran.instances if i.encoder == pretrained.folder / "encoder"]
    return Tree(
        pretrained.label, describe_run(pretrained.folder), [Tree(i.label, describe_run(i.folder)) for i in after]
    )


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
        again = sum(work.num_attempts - 1 for work in works)
        ended = [work.ended for work in works if work.ended is not None]
        facts += [
            ("begun", date(min(work.began for work in works))),
            ("ended", date(max(ended)) if ended else "not yet"),
            (
                "work",
                format_duration(sum(work.seconds for work in works))
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
        Text(f"cd {Path.cwd()}\nfirstlight run {ran.folder / RECIPE_FILE} name={ran.recipe.name}-again", "code"),
        *mlflow_blocks(ran.uri, "Its images and models"),
        resolved_block("The recipe, resolved", ran.recipe.dump()),
    ]
