"""The report of a recipe's run: scores, warnings, stages with figures, data, times, lineage, and how to repeat it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.report import data_notes
from firstlight.pipeline.report.first_screen.headline import compose_headline
from firstlight.pipeline.report.first_screen.opening import draw_gains, list_next_steps
from firstlight.pipeline.report.html_page import (
    Bars,
    Block,
    Facts,
    Fold,
    Group,
    Page,
    PageSection,
    Table,
    Text,
    Tone,
    Tree,
    format_date,
    render_page,
    strip_credentials,
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
    score_blocks,
    warning_blocks,
)
from firstlight.pipeline.report.scores.arm_scores import has_arm_columns
from firstlight.pipeline.report.stage_outputs import list_outputs
from firstlight.pipeline.report.timings import TIME_PARTS, collect_notes, read_timings, time_shares
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.verdicts import TABLE_LEVEL
from firstlight.pipeline.terminal import format_duration
from firstlight.pipeline.tracking.figures import list_figures
from firstlight.pipeline.train.attempts import read_attempts
from firstlight.pipeline.train.context import StageContext

VERDICT_EXPLANATION = (
    f"In brackets: the {100 * (1 - TABLE_LEVEL):g} % confidence interval of the mean gain over seeds (paired t test, "
    "corrected for the number of rows). "
)


@dataclass(frozen=True)
class RunReport:
    """The content of a report. `instances`: those of all stages that have begun. `references`: the references of
    encoders that the recipe takes from MLflow, by stage.
    """

    context: StageContext
    folder: Path
    instances: Sequence[StageInstance]
    rows: Sequence[ScoreRow]
    references: dict[str, str]
    # The id of the parent run in MLflow.
    parent: str | None
    # The folder of the prepare stage.
    prepared: Path
    # The address of MLflow.
    uri: str
    error: str | None = None
    # Further notes about the images.
    notes: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return self.context.recipe

    def instances_of(self, stage: str) -> list[StageInstance]:
        return [instance for instance in self.instances if instance.stage == stage]


def write_run_report(report: RunReport) -> Path:
    """Writes the report, and the recipe that repeats the run, into the folder of the run. Returns the report's file."""
    write_atomically(report.folder / RECIPE_FILE, yaml_reader.dump_yaml(report.recipe.dump()).encode())
    file = report.folder / REPORT_FILE
    write_atomically(file, render_page(build_run_page(report)).encode())
    return file


def build_run_page(report: RunReport) -> Page:
    """Returns the page with all sections of the report."""
    recipe = report.recipe
    status, tone = _run_status(report)
    sections = [
        PageSection("Results", _result_blocks(report)),
        PageSection("Warnings and notes", _note_blocks(report)),
        PageSection("Stages", [_stage_group(report, name) for name in recipe.stages]),
        PageSection("Data", data_blocks(recipe.dataset, report.context.store, report.context.splits, report.prepared)),
        PageSection("Time", _time_blocks(report)),
        PageSection("Lineage", [_lineage_tree(report)]),
        PageSection("What was run", _run_blocks(report)),
        PageSection("Run it again", _repeat_blocks(report)),
    ]
    foot = footer_text(report.uri)
    kicker = "Firstlight, a run of a recipe"
    return Page(recipe.name, kicker, recipe.description, sections, status, tone, foot, _opening_blocks(report))


def _opening_blocks(report: RunReport) -> list[Block]:
    """Returns the first screen: what went wrong, the headline, the gains, and what to do next."""
    rows, recipe_file = report.rows, report.folder / RECIPE_FILE
    chart = draw_gains(rows, len(report.context.splits.test))
    steps = list_next_steps(report.context, rows, report.instances, recipe_file)
    found = [compose_headline(report.recipe, rows), chart, steps]
    return [*error_blocks(report.error), *(block for block in found if block is not None)]


def _run_status(report: RunReport) -> tuple[str, Tone]:
    wanted = len(report.recipe.stages) * len(report.recipe.seeds)
    done = sum(instance.result is not None for instance in report.instances)
    if report.error is not None:
        return f"stopped: {done} of {wanted} parts done", "bad"
    return ("finished", "good") if done == wanted else (f"{done} of {wanted} parts done", "unsure")


def _result_blocks(report: RunReport) -> list[Block]:
    if not report.rows:
        return [Text("Nothing is measured yet.", "quiet")]
    out = score_blocks(report.recipe, report.rows)
    if any(row.verdict is not None and row.verdict.interval for row in report.rows):
        what = "The first of two arms" if has_arm_columns(report.rows) else "Pretraining"
        out.append(Text(f"{VERDICT_EXPLANATION}{what} helps or hurts where the interval leaves out 0.", "quiet"))
    return [*out, *figure_blocks(report.folder / SUMMARY_FOLDER)]


def _note_blocks(report: RunReport) -> list[Block]:
    left_out = [
        line
        for name in report.recipe.stages
        for line in data_notes.describe_left_out(report.recipe, name, report.context.splits)
    ]
    stages = report.recipe.stages.items()
    lines = [
        *(line for name, stage in stages for line in stage_kind(stage).list_warnings(name, stage)),
        *data_notes.describe_problems(report.recipe, report.context.store),
        *report.notes,
        *left_out,
        *collect_notes(report.instances),
    ]
    return warning_blocks(lines)


def _stage_group(report: RunReport, name: str) -> Group:
    stage, instances = report.recipe.stages[name], report.instances_of(name)
    blocks: list[Block] = [Facts(list(_describe_stage(report, name)))]
    drawn = [instance for instance in instances if list_figures(instance.folder)]
    waiting = [
        seed
        for seed in report.recipe.seeds
        if seed not in [instance.seed for instance in instances if instance.result is not None]
    ]
    if waiting:
        blocks.append(
            Text(f"Not finished: seed{'s' if len(waiting) > 1 else ''} {', '.join(map(str, waiting))}.", "quiet")
        )
    if outputs := [output for instance in instances if instance.result for output in list_outputs(stage, instance)]:
        table = [[output.name, str(output.path), output.usage] for output in outputs]
        blocks.append(
            Fold("Outputs", [Table("`import firstlight as fl`", ("output", "folder", "how to open it"), table)])
        )
    if drawn:
        blocks += [Text(f"Pictures of seed {drawn[0].seed}", "quiet"), *figure_blocks(drawn[0].folder)]
    blocks += [Fold(f"Pictures of seed {instance.seed}", figure_blocks(instance.folder)) for instance in drawn[1:]]
    if lines := stage_kind(stage).deviations(stage):
        title = "Known differences from the paper, and values that it does not give"
        blocks.append(Fold(title, [Text(line) for line in lines]))
    blocks.append(
        Fold("Settings", [Text(strip_credentials(yaml_reader.dump_yaml(stage.model_dump(mode="json"))), "code")])
    )
    return Group(name if name == stage.kind else f"{name} ({stage.kind})", blocks)


def _describe_stage(report: RunReport, name: str) -> Iterator[tuple[str, str]]:
    """Yields names and values that a reader wants to know of a stage before its pictures."""
    stage, results = report.recipe.stages[name], [i.result for i in report.instances_of(name) if i.result is not None]
    yield from stage_kind(stage).describe(stage, results)
    if isinstance(stage, TrainingOptions):
        images = next((result.get("images", result.get("labels")) for result in results), None)
        trained_on = f"{images:,} images, " if images else ""
        yield (
            "training",
            f"{trained_on}{stage.length} of batches of {stage.batch_size}, "
            f"{stage.optimizer.name} at {stage.learning_rate:g}",
        )
    source = report.recipe.encoder_source(name)
    if source is not None:
        yield "encoder", str(source)


def _time_blocks(report: RunReport) -> list[Block]:
    batch_sizes: dict[str, int] = {}
    for name, stage in report.recipe.stages.items():
        if isinstance(stage, TrainingOptions):
            batch_sizes[name] = stage.batch_size
    found = read_timings(report.instances, batch_sizes)
    if not found:
        return []
    used = [part for part in TIME_PARTS if any(part in timing.parts for timing in found)]
    bars = Bars(
        "Wall time of each stage and seed, and its parts",
        TIME_PARTS,
        [(t.label, format_duration(t.seconds), time_shares(t)) for t in found],
    )
    lines = [
        [t.label, format_duration(t.seconds), *(f"{t.parts[part]:.1f}" if part in t.parts else "" for part in used)]
        for t in found
    ]
    table = Table("Seconds of worker 0", ["stage", "all", *used], lines, range(1, 2 + len(used)))
    return [bars, Fold("In seconds", [table])]


def _lineage_tree(report: RunReport) -> Tree:
    """Returns the tree from the store to the last stages, with the MLflow run of each."""
    elsewhere = [
        Tree(
            "encoder from MLflow",
            reference,
            [Tree(i.label, describe_run(i.folder)) for i in report.instances_of(stage)],
        )
        for stage, reference in report.references.items()
    ]
    given = [instance for instance in report.instances if _starts_from_given(report.recipe, instance)]
    fresh = [i for i in report.instances if i not in given and (i.encoder is None or _makes_encoder(report, i))]
    name = report.context.store.path.name
    store = Tree(f"store {name}", describe_run(report.prepared), _list_branches(report, fresh))
    begun = [store]
    if given:
        weights = strip_credentials(str(getattr(report.recipe.encoder, "weights", "")))
        begun.append(Tree("given weights", weights, _list_branches(report, given)))
    return Tree(report.recipe.name, f"run {report.parent}" if report.parent else "", [*begun, *elsewhere])


def _makes_encoder(report: RunReport, instance: StageInstance) -> bool:
    return report.recipe.stages[instance.stage].makes_encoder


def _list_branches(report: RunReport, begun: Sequence[StageInstance]) -> list[Tree]:
    """Returns the branches of instances that start from no other instance: those of pretrainings come first."""
    pretrained = [_pretraining_branch(report, instance) for instance in begun if _makes_encoder(report, instance)]
    others = [Tree(i.label, describe_run(i.folder)) for i in begun if not _makes_encoder(report, i)]
    return pretrained + others


def _starts_from_given(recipe: Recipe, instance: StageInstance) -> bool:
    """Returns True if an instance starts from the weights that the recipe names, and from no other encoder."""
    source = recipe.encoder_source(instance.stage)
    return instance.given is not None if source is None else source.is_given


def _pretraining_branch(report: RunReport, pretrained: StageInstance) -> Tree:
    after = [i for i in report.instances if i.encoder == pretrained.folder / "encoder"]
    return Tree(
        pretrained.label, describe_run(pretrained.folder), [Tree(i.label, describe_run(i.folder)) for i in after]
    )


def _run_blocks(report: RunReport) -> list[Block]:
    recipe = report.recipe
    works = [work for instance in report.instances if (work := read_attempts(instance.folder)) is not None]
    facts = [
        ("recipe", recipe.name),
        ("seeds", ", ".join(map(str, recipe.seeds))),
        ("stages", ", ".join(recipe.stages)),
        ("encoder", ", ".join(f"{key}: {value}" for key, value in recipe.network_spec.items())),
    ]
    if works:
        again = sum(work.num_attempts - 1 for work in works)
        ended = [work.ended for work in works if work.ended is not None]
        facts += [
            ("begun", format_date(min(work.began for work in works))),
            ("ended", format_date(max(ended)) if ended else "not yet"),
            (
                "work",
                format_duration(sum(work.seconds for work in works))
                + (f", resumed {again} time{'s' if again > 1 else ''}" if again else ""),
            ),
            *_machine_facts(works[0].machine),
        ]
    return [
        Facts(
            [*facts, ("code", code_version()), ("MLflow", strip_credentials(report.uri)), ("files", str(report.folder))]
        )
    ]


def _machine_facts(machine: dict[str, Any]) -> list[tuple[str, str]]:
    workers = f"{machine['workers']} of {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return [
        ("machine", f"{machine['host']}: {machine['cpus']} CPUs, {machine['system']}"),
        ("device", f"{machine['device']}, workers: {workers}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
    ]


def _repeat_blocks(report: RunReport) -> list[Block]:
    return [
        Text(
            "The same command resumes a run that was stopped. To repeat the run from the start, give it another name:"
        ),
        Text(f"cd {Path.cwd()}\nfirstlight run {report.folder / RECIPE_FILE} name={report.recipe.name}-again", "code"),
        *mlflow_blocks(report.uri, "Its images and models"),
        resolved_block("The recipe, resolved", report.recipe.dump()),
    ]
