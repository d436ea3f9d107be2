"""Publishes a run of a recipe to MLflow: parent run, a run for each stage and seed, model cards, summary and report.

The stages continue while MLflow is unreachable. Failed uploads wait in an outbox, and are repeated later from the files
on disk.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from firstlight.pipeline.config.load import hash_json
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.manifest import DUPLICATES_FILE, MANIFEST_FILE, QUARANTINE_FILE, SUBSETS_FILE
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import Stopped
from firstlight.pipeline.files import write_json
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.report import figures
from firstlight.pipeline.report.cards.card_parts import CARD_FILE
from firstlight.pipeline.report.first_screen.headline import compose_headline
from firstlight.pipeline.report.page_parts import SUMMARY_FOLDER
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.report.publish.filters import add_filter_comparison
from firstlight.pipeline.report.publish.pretrain import add_progress
from firstlight.pipeline.report.publish.registry import find_publisher
from firstlight.pipeline.report.score_table import table_facts
from firstlight.pipeline.report.scores.arm_scores import group_by_measure, has_arm_columns
from firstlight.pipeline.report.store_figures import add_store_figures
from firstlight.pipeline.report.summary_metrics import list_summary_metrics
from firstlight.pipeline.run.graph import StageGraph
from firstlight.pipeline.stages.code_version import code_version, git_commit
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance, TrainingSegment
from firstlight.pipeline.tracking.client import DESCRIPTION_TAG, TEACHER_TAG, TrackingClient
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.metric_keys import SECONDS_METRIC
from firstlight.pipeline.tracking.outbox import Outbox, Unpublished
from firstlight.pipeline.tracking.progress import ProgressListener
from firstlight.pipeline.tracking.recipe_parts import link_models
from firstlight.pipeline.tracking.references import find_source_run
from firstlight.pipeline.tracking.retry import TrackingUnavailable
from firstlight.pipeline.tracking.run_file import RUN_FILE, read_run_file, read_run_id
from firstlight.pipeline.train.attempts import read_attempts
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import read_metrics
from firstlight.tasks.nn.weights.weight_sources import name_weights

PUBLISHED_FILE = "published.json"
# The folder in that of a run for the files that note the run in MLflow of each version of the recipe.
NOTES_FOLDER = "recipes"


@dataclass(frozen=True)
class ParentRun:
    """Output folder and parent of a nested run, such as a search trial."""

    folder: Path
    # Tags and parameters of its own MLflow run.
    tags: Mapping[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)
    # A store that is written and checked already.
    store: Path | None = None
    # Called with every row that a training logs.
    listener: ProgressListener | None = None
    # The part of one of its trainings that is to be done.
    segment: TrainingSegment | None = None


@dataclass(frozen=True)
class RepeatOf:
    """An earlier run that is repeated: its id, the sha256 of its images, and where its encoders are kept."""

    run_id: str
    store: str
    origin: TrackingLocation


class RunPublisher:
    """Publishes one command's run of a recipe. `folder`: that of the run's files."""

    def __init__(
        self, recipe: Recipe, folder: Path, console: Console, parent: ParentRun | None, repeats: RepeatOf | None
    ) -> None:
        self.recipe, self.folder, self.console, self.parent, self.repeats = recipe, folder, console, parent, repeats
        # The origin is opened first: MLflow's global settings are those of the client that was opened last.
        self.origin = TrackingClient(recipe, repeats.origin) if repeats else None
        self.tracking = TrackingClient(recipe, console=console)
        self.outbox = Outbox(self.tracking.uri, console)
        # Runs that this command has started and not finished.
        self.open_runs: list[str] = []
        # The run of each instance of this command, by the instance's label.
        self.stage_runs: dict[str, str] = {}
        self.parent_run: str | None = None

    def set_images(self, context: StageContext, graph: StageGraph) -> None:
        """Sets the images and the stage graph, which exist once the images are prepared."""
        self.context, self.graph, self.store = context, graph, context.store
        # The recipe has the colours of the images now.
        self.recipe = self.tracking.recipe = context.recipe

    # The parent run

    def start_parent(self, store: Store) -> str:
        """Returns the id of the parent run, which is started when the first stage has something to do."""
        if self.parent_run is None:
            tags = {
                "firstlight.recipe": self.recipe.name,
                DESCRIPTION_TAG: self.recipe.description,
                **git_commit(),
            }
            tags |= {"firstlight.repeats": self.repeats.run_id} if self.repeats else {}
            params = {"code": code_version(), "store": store.hash}
            if self.parent:
                tags, params = {**tags, **self.parent.tags}, {**self.parent.params, **params}
            run_id = self.tracking.start_run(self.recipe.name, self._parent_file(store), params, tags)
            self._mark_closed(store, closed=False)
            self.tracking.log_store(run_id, store, "recipe")
            self.tracking.client.log_dict(run_id, self.recipe.dump(), "recipe.json")
            self.open_runs.append(run_id)
            self.parent_run = run_id
        return self.parent_run

    def _parent_file(self, store: Store) -> Path:
        """Returns the file that holds the id of the parent run, and whether its summary is published."""
        if self.parent:
            return self.folder / RUN_FILE
        key = hash_json({"recipe": self.recipe.dump(), "store": store.hash, "code": code_version()})
        return self.folder / NOTES_FOLDER / f"{key[:12]}.json"

    def _mark_closed(self, store: Store, closed: bool) -> None:
        file = self._parent_file(store)
        write_sealed_json(file, {**read_run_file(file), "closed": closed})

    def known_parent(self, store: Store) -> str | None:
        """Returns the id of the parent run of this or an earlier command with the same recipe, None if none exists."""
        return self.parent_run or read_run_file(self._parent_file(store)).get("run_id")

    # Stages

    def publish_store(self, store: Store, context: StageContext, instance: StageInstance) -> None:
        """Logs a store with the pictures of its images as the run of the stage `prepare`."""
        params = {"store": store.location, "hash": store.hash, "classes": len(store.classes)}
        params |= {"source": store.source["kind"], "root": self.recipe.dataset.root or self.recipe.dataset.list or ""}
        params |= {"extends": store.extends[-1].name} if store.extends else {}
        tags = {"mlflow.parentRunId": self.start_parent(store), "firstlight.kind": "prepare"}
        run_id = self.tracking.start_run("prepare", instance.folder / RUN_FILE, params, tags)
        counts = {f"images_{split}": count for split, count in store.splits.items()}
        self.tracking.log_results(run_id, {**counts, "quarantined": store.quarantined, **store.images["duplicates"]})
        for name in (MANIFEST_FILE, QUARANTINE_FILE, DUPLICATES_FILE, *([SUBSETS_FILE] if store.subsets else [])):
            self.tracking.client.log_artifact(run_id, str(store.path / name))
        add_store_figures(FigureLog(self.tracking, run_id, instance.folder), context)
        self.tracking.finish_run(run_id)
        write_json(instance.folder / PUBLISHED_FILE, {"run_id": run_id})

    def open_instances(self, instances: Sequence[StageInstance]) -> None:
        """Starts the runs of instances, so that MLflow shows them while they work; if it is unreachable, later."""
        try:
            for instance in instances:
                self.start_instance(instance)
        except TrackingUnavailable as error:
            self.outbox.note_outage(str(error))

    def start_instance(self, instance: StageInstance) -> str:
        """Returns the id of the run of an instance of this command, started when it is asked for first."""
        if instance.label not in self.stage_runs:
            attempts = read_attempts(instance.folder)
            began = attempts.began if attempts else None
            run_id = self.tracking.start_stage_run(instance, self.start_parent(self.store), self.store, began)
            self._log_encoder_source(run_id, instance)
            self.open_runs.append(run_id)
            self.stage_runs[instance.label] = run_id
        return self.stage_runs[instance.label]

    def put_instance(self, instance: StageInstance) -> None:
        """Publishes a finished instance, at once or when MLflow is back."""
        self.outbox.put(instance.label, partial(self._publish_instance, instance))

    def _publish_instance(self, instance: StageInstance) -> None:
        stage, run_id = self.recipe.stages[instance.stage], self.start_instance(instance)
        # The rows that MLflow does not have come first. A part of the last row may be there, so it is logged again.
        for file in stage_kind(stage).metrics_files(stage, instance):
            self.tracking.log_missing_metrics(run_id, read_metrics(file.path), file.prefix)
        find_publisher(stage.kind).publish(self.tracking, run_id, self.context, stage, instance)
        attempts = read_attempts(instance.folder)
        if attempts is not None:
            # A run that was resumed also spans the time in between, which is not its work.
            self.tracking.log_results(run_id, {SECONDS_METRIC: attempts.seconds})
        self.tracking.finish_run(run_id, ended=attempts.ended if attempts else None)
        self.open_runs.remove(run_id)
        write_json(instance.folder / PUBLISHED_FILE, {"run_id": run_id})

    def find_last_step(self, instance: StageInstance, prefix: str) -> int:
        """Returns the last step that MLflow has of a training, -1 if it has none or is unreachable.

        Rows that MLflow has already may be logged again: they count once. The run of an instance that has not begun is
        started later, so that its time is its own.
        """
        if read_run_id(instance.folder) is None:
            return -1
        try:
            return self.tracking.find_last_step(self.start_instance(instance), f"{prefix}loss")
        except TrackingUnavailable as error:
            self.outbox.note_outage(str(error))
            return -1

    def log_rows(self, instance: StageInstance, prefix: str, rows: list[dict[str, Any]]) -> None:
        """Logs new rows of a training, which may be lost if MLflow is unreachable: they are logged again at its end."""
        self.tracking.log_metrics_once(self.start_instance(instance), rows, prefix)

    def _log_encoder_source(self, run_id: str, instance: StageInstance) -> None:
        source, given = self.recipe.encoder_source(instance.stage), self.graph.references.given
        if given is not None and (instance.given is not None or (source is not None and source.is_given)):
            self.tracking.log_weights(run_id, given.reference, given.facts)
        teacher = self.graph.references.teachers.get(instance.stage)
        if teacher is not None:
            self.tracking.log_weights(run_id, teacher.reference, teacher.facts, TEACHER_TAG)
        if source is None:
            return
        if source.is_given:
            assert given is not None
            if given.run_id is not None:
                self.tracking.log_encoder_source(run_id, given.reference, given.run_id)
        elif source.stage is not None:
            upstream = self.graph.find_upstream(instance.stage, instance.seed)
            made_by = read_run_id(upstream.folder) or self.start_instance(upstream)
            self.tracking.log_encoder_source(run_id, f"runs:/{made_by}/{source.artifact}", made_by)
        else:
            reference = self.graph.references.encoders[instance.stage][0]
            self.tracking.log_encoder_source(
                run_id, reference, find_source_run(self.origin or self.tracking, reference)
            )

    # The end of a run

    def put_cards(self, instances: Sequence[StageInstance], rows: Sequence[ScoreRow]) -> None:
        """Writes and publishes the model cards of exports and fine-tuned models.

        `rows`: the table of what has finished.
        """
        described = [one for one in instances if find_publisher(self.recipe.stages[one.stage].kind).card_folder]
        if described:
            self.outbox.put("the model cards", lambda: self._publish_cards(described, rows))

    def _publish_cards(self, described: Sequence[StageInstance], rows: Sequence[ScoreRow]) -> None:
        for instance in described:
            stage = self.recipe.stages[instance.stage]
            publisher, siblings = find_publisher(stage.kind), self._find_scored(instance)
            text = publisher.write_card(self.context, instance, siblings, rows, self._describe_lineage(instance))
            if text is None:
                continue
            file = instance.folder / publisher.card_folder / CARD_FILE
            run_id = read_run_id(instance.folder) or self.start_instance(instance)
            try:
                self.tracking.log_model_card(run_id, file, text, publisher.card_folder)
            except TrackingUnavailable:
                # A card on disk counts as published.
                file.unlink()
                raise

    def _find_scored(self, instance: StageInstance) -> list[StageInstance]:
        """Returns the finished instances whose scores tell of the network of `instance`, for all seeds."""
        source = self.recipe.encoder_source(instance.stage)
        if self.recipe.stages[instance.stage].makes_model:
            scored = instance.stage
        elif source is not None and source.artifact == "model" and source.stage is not None:
            scored = source.stage
        else:
            return self.graph.find_siblings(instance)
        return [one for one in self.graph.find_begun(scored) if one.result is not None]

    def _describe_lineage(self, instance: StageInstance) -> dict[str, str]:
        """Returns the MLflow runs and references that a card names, by role."""
        source, own = self.recipe.encoder_source(instance.stage), f"runs:/{read_run_id(instance.folder)}"
        kind = str(self.recipe.stages[instance.stage].kind)
        return {kind: own} if source is None else {str(source.artifact): self._describe_origin(instance), kind: own}

    def _describe_origin(self, instance: StageInstance) -> str:
        source = self.recipe.encoder_source(instance.stage)
        assert source is not None
        if source.is_given:
            assert self.graph.references.given is not None
            # A path on this machine means nothing to readers of a card.
            return name_weights(self.graph.references.given.reference, self.recipe.network_spec)
        if source.stage is None:
            return self.graph.references.encoders[instance.stage][0]
        return f"runs:/{read_run_id(self.graph.find_upstream(instance.stage, instance.seed).folder)}"

    def put_summary(self, rows: list[ScoreRow], instances: Sequence[StageInstance]) -> None:
        """Publishes the table into the parent run, if this command or an earlier one left something to publish."""
        if self.parent_run is None and not instances:
            self.console.print(f"the store is complete: {self.store.location}", soft_wrap=True, markup=False)
            return
        left_open = not read_run_file(self._parent_file(self.store)).get("closed", True)
        if self.parent_run is None and not self.outbox.waiting and not left_open:
            self.console.print("every stage has finished before and nothing has changed: nothing was run")
            return
        self.outbox.put("the summary", lambda: self._publish_summary(self.start_parent(self.store), rows, instances))

    def _publish_summary(self, run_id: str, rows: list[ScoreRow], instances: Sequence[StageInstance]) -> None:
        self.tracking.log_results(run_id, list_summary_metrics(self.recipe, rows))
        self.tracking.client.set_tag(run_id, DESCRIPTION_TAG, self._describe_run(rows))
        figure_log = FigureLog(self.tracking, run_id, self.folder / SUMMARY_FOLDER)
        if compared := [row for row in rows if row.baseline and row.is_scored]:
            if has_arm_columns(compared):
                caption = "test scores of the network with pretrained, given and fresh weights"
                figure_log.add("comparison", figures.draw_arm_comparison(group_by_measure(compared)), caption)
            else:
                caption = "test scores of the pretrained network and of the same network without pretraining"
                figure_log.add("comparison", figures.draw_comparison(table_facts(self.recipe, compared)), caption)
        add_progress(figure_log, self.recipe, instances)
        add_filter_comparison(figure_log, self.recipe, instances)
        if rows:
            self.tracking.client.log_dict(run_id, {"rows": table_facts(self.recipe, rows)}, "table.json")
        for name in dict.fromkeys(instance.stage for instance in instances):
            folders = [instance.folder for instance in instances if instance.stage == name]
            stage_runs = [run for folder in folders if (run := read_run_id(folder))]
            self.tracking.log_stage_runs(run_id, name, stage_runs)
            link_models(self.tracking, run_id, stage_runs)
        self.tracking.finish_run(run_id)
        self.open_runs.remove(run_id)
        self._mark_closed(self.store, closed=True)

    def _describe_run(self, rows: Sequence[ScoreRow]) -> str:
        """Returns what MLflow shows above a run's numbers, in Markdown: the headline and the recipe's description."""
        headline = compose_headline(self.recipe, rows)
        sentences = " ".join((f"**{headline.text}**", *headline.details))
        return "\n\n".join(filter(None, (sentences, self.recipe.description)))

    def put_report(self, file: Path) -> None:
        """Publishes the report into the parent run, if it exists."""
        parent = self.known_parent(self.store)
        if parent is not None:
            self.outbox.put("the report", lambda: self.tracking.client.log_artifact(parent, str(file)))

    def flush(self, rows: list[ScoreRow]) -> None:
        """Publishes all that waits in the outbox.

        Raises:
            Unpublished: MLflow does not come back; the error carries `rows`.
        """
        try:
            self.outbox.flush()
        except Unpublished as error:
            error.rows = tuple(rows)
            raise

    def close_failed(self, error: BaseException, report: Path | None) -> None:
        """Ends the open runs as KILLED or FAILED and logs the report. The next command opens them again."""
        # MLflow itself may have failed; the first error is the one that the user should see.
        with contextlib.suppress(Exception):
            parent = self.known_parent(self.store) if report is not None else None
            if parent is not None:
                self.tracking.client.log_artifact(parent, str(report))
        with contextlib.suppress(Exception):
            for run_id in self.open_runs:
                self.tracking.finish_run(
                    run_id, "KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED"
                )
