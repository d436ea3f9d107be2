"""Runs the stages of a recipe in order. A stopped stage is resumed; a finished one is not run again."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data import image_statistics
from firstlight.pipeline.data.prepare.target import describe_other_stores
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import Paused, UserError, one_line
from firstlight.pipeline.files import exclusive_lock
from firstlight.pipeline.report import data_notes, run_report
from firstlight.pipeline.report.earlier_report import keep_earlier_report
from firstlight.pipeline.report.page_parts import describe_error
from firstlight.pipeline.report.score_table import list_score_lines
from firstlight.pipeline.report.stage_outputs import describe_outputs
from firstlight.pipeline.run import memory
from firstlight.pipeline.run.auto_scale import resolve_scale
from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.pipeline.run.data_checks import check_companion_images, check_images
from firstlight.pipeline.run.given_weights import resolve_given
from firstlight.pipeline.run.graph import ResolvedReferences, StageGraph, adopt_encoder, resolve_references
from firstlight.pipeline.run.input_colours import fill_input_colours
from firstlight.pipeline.run.launch import launch_instances
from firstlight.pipeline.run.launching.side_processes import SideProcesses, count_side_processes, is_long
from firstlight.pipeline.run.launching.threads import fix_threads
from firstlight.pipeline.run.mirroring import RunMirror, upload_inputs
from firstlight.pipeline.run.preflight import check_recipe
from firstlight.pipeline.run.preparing.ahead import StoreAhead, check_kind
from firstlight.pipeline.run.preparing.recipe_store import RecipeStore, print_lines, write_recipe_store
from firstlight.pipeline.run.publishing import NOTES_FOLDER, PUBLISHED_FILE, ParentRun, RepeatOf, RunPublisher
from firstlight.pipeline.run.ray_session import RaySession, is_verbose
from firstlight.pipeline.run.teacher_weights import resolve_teachers
from firstlight.pipeline.stages.artifacts.encoder_description import (
    check_encoder_spec,
    read_encoder_spec,
    was_trained_on_all,
)
from firstlight.pipeline.stages.features.kept_features import keep_features_for
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.score_rows import ScoreRow, score_rows
from firstlight.pipeline.stages.shared_work import SHARED_FOLDER
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.terminal import escape_line
from firstlight.pipeline.tracking.loggers.registry import check_loggers
from firstlight.pipeline.tracking.outbox import Unpublished
from firstlight.pipeline.tracking.progress import FollowedFile, ProgressFollower
from firstlight.pipeline.tracking.run_file import read_run_id
from firstlight.pipeline.train.attempts import record_attempt
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.held import budget

# The time that the process of a killed search's trial needs to notice that it is alone, and to end.
TRIAL_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RecipeRun:
    """The results of one run of a recipe: the rows of its table, and the instances of its stages."""

    rows: list[ScoreRow]
    instances: list[StageInstance]
    # The MLflow run of the recipe; None if nothing was published of it.
    run_id: str | None
    folder: Path


def run_recipe(
    recipe: Recipe,
    console: Console,
    only: str | None = None,
    *,
    repeats: RepeatOf | None = None,
    parent: ParentRun | None = None,
    ahead: StoreAhead | None = None,
) -> RecipeRun:
    """Runs the unfinished stages of a recipe.

    `only`: a kind of stage; the stages of other kinds are left out, and with `prepare` all of them.
    `repeats`: the run that this one repeats. `parent`: what the run is a part of, such as a trial of a search.
    `ahead`: the store of the recipe, if it is being written already; then the recipe is locked.

    Raises:
        UserError: a mistake that the user can correct, found before the work starts where possible.
        StopTraining, StageFailed: see `launch`.
        Unpublished: all stages finished, but MLflow is unreachable; the next run publishes the missing results.
    """
    check_kind(recipe, only)
    check_loggers(recipe.tracking.loggers)
    recipe, chosen = resolve_scale(recipe)
    recipe, adopted = adopt_encoder(recipe, repeats.origin if repeats else None, only)
    for line in filter(None, (chosen, adopted)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    source = ahead.take_source() if ahead else None
    source = check_recipe(recipe, source) if parent is None or parent.store is None else None
    folder = parent.folder if parent else recipe.storage.resolve() / recipe.name
    timeout_s = TRIAL_LOCK_TIMEOUT_S if parent else 0.0
    lock = contextlib.nullcontext() if ahead else exclusive_lock(folder, recipe.name, timeout_s)
    # A trial of a search has the CPUs that the search gives it.
    most = 0 if parent else count_side_processes(recipe)
    with (
        lock,
        RaySession(recipe.scale, recipe.stream, console.print) as session,
        keep_features_for(folder),
        SideProcesses(most, lambda line: console.print(f"  {line}", highlight=False, soft_wrap=True)) as others,
    ):
        runner = RecipeRunner(recipe, session, console, parent, repeats, others, source, ahead)
        # The runner lets the listing go when the store is there; of many files it is large.
        del source
        try:
            rows = runner.run(only)
            return RecipeRun(rows, runner.instances, runner.run_id, runner.folder)
        except BaseException as error:
            runner.abandon(error)
            raise


def prepare_store(recipe: Recipe, session: RaySession, console: Console, parent: ParentRun) -> Store:
    """Prepares the store only, with its pictures in MLflow, as a part of the run that `parent` describes.

    Raises:
        UserError: as `run_recipe`.
    """
    runner = RecipeRunner(recipe, session, console, parent)
    runner.prepare()
    return runner.context.store


class RecipeRunner:
    """Schedules the stages of one command's run of a recipe. A `RunPublisher` publishes it to MLflow."""

    def __init__(
        self,
        recipe: Recipe,
        session: RaySession,
        console: Console,
        parent: ParentRun | None = None,
        repeats: RepeatOf | None = None,
        others: SideProcesses | None = None,
        source: Source | None = None,
        ahead: StoreAhead | None = None,
    ) -> None:
        """Takes `source`, the source of `recipe.dataset`, if it is open already, and `ahead` as `run_recipe`."""
        self.others, self.source, self.ahead = others, source, ahead
        self.recipe, self.session, self.console, self.parent, self.repeats = recipe, session, console, parent, repeats
        self.folder = parent.folder if parent else recipe.storage.resolve() / recipe.name
        self.mirror = RunMirror(self.folder, lambda line: self._print_notes([line]))
        self.publisher = RunPublisher(recipe, self.folder, console, parent, repeats)
        self.instances: list[StageInstance] = []
        # The names of the stages that the command is to run.
        self.asked: list[str] = []
        self.references = ResolvedReferences()

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the recipe on the images that were prepared, None if nothing was published of it."""
        return self.publisher.known_parent(self.context.store)

    def run(self, only: str | None) -> list[ScoreRow]:
        """Runs all stages, or those of the kind `only`, and publishes the table, the model cards and the report."""
        self.mirror.fetch_run()
        origin = self.publisher.origin or self.publisher.tracking
        self.recipe, given, notes = resolve_given(self.recipe, origin)
        self._print_lines(notes)
        self.references = resolve_references(self.recipe, origin, self.folder / "inputs", only)
        self.references.given = given
        self.references.teachers, notes = resolve_teachers(self.recipe, origin)
        self._print_lines(notes)
        self.asked = [name for name, stage in self.recipe.stages.items() if only in (None, stage.kind)]
        for name in self.asked:
            stage = self.recipe.stages[name]
            self._print_notes(stage_kind(stage).list_warnings(name, stage))
        self.prepare()
        self._print_notes(keep_earlier_report(self.folder, self.recipe))
        for name in self.asked:
            self.run_stage(name)
        table = score_rows(self.recipe, self._known_instances())
        ran = {instance.stage for instance in self.instances}
        # Verdicts are those of the whole table, also where this command ran a part of the stages.
        rows = [row for row in table if row.stage in ran]
        self.publisher.put_cards(self.instances, table)
        self.publisher.put_summary(rows, self.instances)
        self._publish_report()
        try:
            self.publisher.flush(rows)
        finally:
            self.mirror.put_run()
        self.mirror.flush(rows)
        return rows

    def prepare(self) -> None:
        """Writes or opens the store. The first time, prints and draws statistics of its images."""
        if self.parent and self.parent.store:
            self._use_store(Store.open(self.parent.store))
            return
        prepared = self._prepare_store()
        store = prepared.store
        if self.repeats and store.hash != self.repeats.store:
            raise UserError(
                f"repeat: the images differ: this store has sha256 {store.hash}, "
                f"that of the run had {self.repeats.store}"
            )
        self.mirror.put(store.path)
        instance = self._prepare_instance(store)
        is_new = not (instance.folder / PUBLISHED_FILE).exists()
        if is_new:
            self._print_lines([] if prepared.was_described else store.source.get("reading", []))
            self._print_lines(image_statistics.describe_statistics(store.images, store.splits))
            self._print_notes(describe_other_stores(self.recipe.dataset, store))
        self._print_notes(data_notes.describe_problems(self.recipe, store))
        self._use_store(store)
        self._start_others()
        self._print_notes(self._describe_seen_images(store))
        if is_new:
            self._print_lines([f"images: {self.context.splits.describe_counts(bool(store.splits.get('val')))}"])
            publish = partial(self.publisher.publish_store, store, self.context, instance)
            self.publisher.outbox.put("prepare", publish)

    def _prepare_store(self) -> RecipeStore:
        """Writes or opens the store, unless that was begun before."""
        source, self.source = self.source, None
        side = find_recipe_side(self.recipe)
        prepared = self.ahead.finish(side) if self.ahead else None
        return prepared or write_recipe_store(self.recipe, side, source, self.console, self._join_cluster)

    def _join_cluster(self) -> bool:
        """Joins the cluster that is to write the store, and returns True.

        A single machine writes its store without Ray, whose start takes longer than that of some processes.
        """
        return self.recipe.scale.address != "local" and self.session.start()

    def _print_lines(self, lines: Sequence[str]) -> None:
        print_lines(self.console, lines)

    def _describe_seen_images(self, store: Store) -> list[str]:
        """Returns notes about encoders that were trained on all images of the store."""
        seen = {
            name: reference
            for name, (reference, folder) in self.references.encoders.items()
            if was_trained_on_all(folder, store.hash)
        }
        return data_notes.describe_seen_images(self.recipe, seen)

    def _use_store(self, store: Store) -> None:
        """Checks the recipe against its images, and builds the stage graph."""
        self._fill_colours(store)
        segment = self.parent.segment if self.parent else None
        self.graph = StageGraph(self.recipe, self.folder, store.hash, self.references, segment)
        self.context = StageContext.create(self.recipe, store, on_ray=False)
        self.publisher.set_images(self.context, self.graph)
        check_images(self.recipe, self.context.splits)
        check_companion_images(self.recipe, self.references.companions, store.hash, self.context.splits)
        estimate = memory.check_memory(self.recipe, store, len(self.context.splits.train))
        if is_verbose():
            self.console.print(f"memory, estimated: {estimate}", highlight=False, soft_wrap=True)

    def _start_others(self) -> None:
        """Starts the processes that share the seeds of a long recipe whose first stage is not finished."""
        if self.others is None or self.others.most == 0 or not self.asked:
            return
        if not is_long(self.recipe, self.context.splits):
            return
        if any(self.graph.find_instance(self.asked[0], seed).result is None for seed in self.recipe.seeds):
            self.others.start()

    def _fill_colours(self, store: Store) -> None:
        """Puts the colours of the images, or of the encoders that the stages start from, in place of nulls."""
        folders = {name: folder for name, (_, folder) in self.references.encoders.items()}
        filled = fill_input_colours(self.recipe, store, [read_encoder_spec(folder) for folder in folders.values()])
        if filled is self.recipe:
            return
        self.recipe, spec = filled, filled.network_spec
        for name, folder in folders.items():
            check_encoder_spec(folder, spec, f"stages.{name}.encoder")
        self._print_lines([f"encoder.mean: {spec['mean']}, encoder.std: {spec['std']}"])

    def _prepare_instance(self, store: Store) -> StageInstance:
        return StageInstance("prepare", 0, store.hash[:12], self.folder / f"prepare-{store.hash[:12]}")

    def _print_notes(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(f"[yellow]note[/] {escape(escape_line(line))}", highlight=False, soft_wrap=True)

    def run_stage(self, name: str) -> None:
        """Runs one stage for all seeds. Finished instances are kept, begun ones continue."""
        instances = [self.graph.find_instance(name, seed) for seed in self.recipe.seeds]
        self.instances += instances
        unfinished = [instance for instance in instances if instance.result is None]
        unpublished = [instance for instance in instances if not (instance.folder / PUBLISHED_FILE).exists()]
        self.publisher.open_instances(unpublished[:1])
        if unfinished:
            # The runs in MLflow are noted there: another machine that continues should not start others.
            self.mirror.put(self.folder / NOTES_FOLDER, *(instance.folder for instance in unfinished))
            self._run_instances(name, unfinished)
            self.mirror.put(self.folder / SHARED_FOLDER, *(instance.folder for instance in unfinished))
            self._print_results(name, instances)
        for instance in unpublished:
            self.publisher.put_instance(instance)
        self.mirror.put(*(instance.folder for instance in unpublished))
        for instance in instances:
            if instance not in unpublished:
                run_id = read_run_id(instance.folder)
                self.console.print(f"{instance.label}: finished before, unchanged ({run_id})", highlight=False)

    def _print_results(self, name: str, instances: Sequence[StageInstance]) -> None:
        """Prints the scores of a stage that has just finished, and where its outputs are."""
        rows = [row for row in score_rows(self.recipe, self._known_instances()) if row.stage == name]
        lines = [*list_score_lines(rows), *describe_outputs(self.recipe.stages[name], instances)]
        for line in lines:
            self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def _run_instances(self, name: str, instances: Sequence[StageInstance]) -> None:
        """Runs the instances of a stage where its kind runs: on the training workers, or in this process."""
        stage = self.recipe.stages[name]
        kind = stage_kind(stage)
        followed = []
        for instance in instances:
            instance.folder.mkdir(parents=True, exist_ok=True)
            for file in kind.metrics_files(stage, instance):
                log = partial(self.publisher.log_rows, instance, file.prefix)
                logged = self.publisher.find_last_step(instance, file.prefix)
                followed.append(FollowedFile(file.path, file.label, log, logged=logged, instance=instance))
        self._print_notes(data_notes.describe_left_out(self.recipe, name, self.context.splits))
        if isinstance(stage, TrainingOptions):
            self._print_notes(
                budget.explain_streaming(self.recipe.stream, self.context.store, len(self.context.splits.train))
            )
        on_ray = self.session.start() if kind.runs_on != "driver" else False
        with ProgressFollower(self.console, name, followed, self.parent.listener if self.parent else None):
            if kind.runs_on == "workers":
                launch_instances(self.recipe, self.context.store, instances, self.others)
                return
            upload_inputs(self.recipe, instances)
            context = StageContext.create(fix_threads(self.recipe, name), self.context.store, on_ray)
            for instance in instances:
                with record_attempt(instance.folder, context.device):
                    kind.run(context, stage, instance)

    def _known_instances(self) -> list[StageInstance]:
        """Returns the instances that this command or an earlier one has begun."""
        return [instance for name in self.recipe.stages for instance in self.graph.find_begun(name)]

    def write_report(self, error: BaseException | None = None) -> Path:
        """Writes the report of the recipe, from the results of this and earlier commands. Returns its file."""
        known = self._known_instances()
        ran = run_report.RunReport(
            self.context,
            self.folder,
            known,
            score_rows(self.recipe, known),
            {name: reference for name, (reference, _) in self.references.encoders.items()},
            self.publisher.known_parent(self.context.store),
            self._prepare_instance(self.context.store).folder,
            self.publisher.tracking.uri,
            None if error is None else describe_error(error),
            tuple(self._describe_seen_images(self.context.store)),
        )
        return run_report.write_run_report(ran)

    def _publish_report(self) -> None:
        """Writes and publishes the report. The results stay valid if it cannot be written."""
        try:
            self.publisher.put_report(self.write_report())
        except OSError as error:
            self._print_notes([f"the report could not be written: {one_line(error)}"])

    def abandon(self, error: BaseException) -> None:
        """Ends the open runs, and writes a report of the results so far. The runs of a paused training stay open."""
        if isinstance(error, Paused):
            return
        report = None
        # The first error is the one that the user should see.
        with contextlib.suppress(Exception):
            if self.instances and not isinstance(error, Unpublished):
                report = self.write_report(error)
                self.console.print(f"what is known so far: {report}", soft_wrap=True, highlight=False, markup=False)
        self.publisher.close_failed(error, report)
        with contextlib.suppress(Exception):
            self.mirror.put_run()
