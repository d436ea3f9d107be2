"""A recipe: its stages chained by artifact, each one resumed where it stopped, and none that has finished done twice."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape

from firstlight.pipeline.config.recipe import Downstream, Export, Recipe, Training, digest
from firstlight.pipeline.data import image_statistics
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.store import DUPLICATES, MANIFEST, QUARANTINE, SUBSETS, Store
from firstlight.pipeline.errors import Paused, Stopped, UserError
from firstlight.pipeline.files import exclusive_lock, write_json
from firstlight.pipeline.report import figures, model_card, run_report
from firstlight.pipeline.report.score_table import Row, facts, rows
from firstlight.pipeline.report.store_figures import add_pictures
from firstlight.pipeline.run import data_checks, memory, preflight
from firstlight.pipeline.run.graph import Chain, Fetched, fetch
from firstlight.pipeline.run.launch import launch
from firstlight.pipeline.run.ray_session import Session, verbose
from firstlight.pipeline.stages import embed, evaluate, export, finetune, pretrain, retrieve
from firstlight.pipeline.stages.stage import Instance, Passage, code_version, git_commit
from firstlight.pipeline.tracking.client import RUN_FILE, Tracking, remembered, run_of
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.tracking.location import Records
from firstlight.pipeline.tracking.progress import Counted, Follow, Followed, Listener
from firstlight.pipeline.tracking.retry import Away, Outbox, Unpublished
from firstlight.pipeline.train import device_cache
from firstlight.pipeline.train.attempts import attempt
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.metrics import read_metrics

STAGES: dict[str, ModuleType] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "finetune": finetune,
    "retrieve": retrieve,
    "embed": embed,
    "export": export,
}
PUBLISHED = "published.json"
TAKEN_OVER_S = 60.0  # in which the process of a killed search's trial notices that it is alone, and ends


@dataclass(frozen=True)
class Place:
    """Where a run has its files, if not in a folder of its name, and what it is a part of: the tags and params of its run in MLflow, which the
    folder remembers. `store`: written and checked before. `passage`: the part of one of its trainings that is to be made."""

    folder: Path
    tags: Mapping[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)
    store: Path | None = None
    listener: Listener | None = None
    passage: Passage | None = None


@dataclass(frozen=True)
class Repeats:
    """An earlier run of a recipe, which this one gives again. `store`: sha256 of its images; `origin`: where its encoders are kept."""

    run_id: str
    store: str
    origin: Records


def run(recipe: Recipe, console: Console, only: str | None = None, repeats: Repeats | None = None) -> list[Row]:
    """Do what is left to do of a recipe (or of its stages of one kind; `prepare` alone prepares); the rows of its table.

    Raises:
        UserError: a mistake that the user can mend, found before the work starts where possible.
        StopTraining, StageFailed: see `launch`.
        Unpublished: all was done, but MLflow went away and did not come back; the next run publishes what it has not got.
    """
    return run_in(None, recipe, console, only, repeats)[0]


def run_in(
    place: Place | None, recipe: Recipe, console: Console, only: str | None = None, repeats: Repeats | None = None
) -> tuple[list[Row], list[Instance]]:
    """As `run`, as a part of something else (a trial of a search, say); also the instances of its stages."""
    if place is None or place.store is None:
        preflight.check(recipe)
    folder = place.folder if place else recipe.storage.resolve() / recipe.name
    with (
        exclusive_lock(folder, recipe.name, TAKEN_OVER_S if place else 0.0),
        Session(recipe.scale, recipe.stream, console.print) as session,
    ):
        runner = _Runner(recipe, session, console, place, repeats)
        try:
            runner.fetch(only)
            runner.prepare()
            for name, stage in recipe.stages.items():
                if only in (None, stage.kind):
                    runner.stage(name)
            found = rows(recipe, runner.instances)
            if any(isinstance(stage, Export) for stage in recipe.stages.values()):
                runner.outbox.put("the model cards", runner.write_cards)
            runner.close(found)
            runner.report()
            runner.settle(found)
            return found, runner.instances
        except BaseException as error:
            runner.abandon(error)
            raise


def prepared(recipe: Recipe, session: Session, console: Console, place: Place) -> Store:
    """Only the store, with its pictures in MLflow, as a part of the run that `place` tells of.

    Raises:
        UserError: as `run`.
    """
    runner = _Runner(recipe, session, console, place)
    runner.prepare()
    return runner.store


class _Runner:
    """The state of one `firstlight run`: store, MLflow runs, and the instances so far."""

    def __init__(
        self,
        recipe: Recipe,
        session: Session,
        console: Console,
        place: Place | None = None,
        repeats: Repeats | None = None,
    ) -> None:
        self.recipe, self.session, self.console, self.place, self.repeats = recipe, session, console, place, repeats
        self.folder = place.folder if place else recipe.storage.resolve() / recipe.name
        self.origin = (
            Tracking(recipe, repeats.origin) if repeats else None
        )  # before the other: MLflow's global setting is that of the last
        self.tracking = Tracking(recipe)
        self.instances: list[Instance] = []
        self.fetched = Fetched()
        self.outbox = Outbox(self.tracking.uri, console)
        self.open_runs: list[str] = []
        self.stage_runs: dict[str, str] = {}  # label of an instance -> its run, of this command
        self.parent_run: str | None = None

    def parent(self) -> str:
        """The parent run, started when the first stage has something to do."""
        if self.parent_run is None:
            tags = {
                "firstlight.recipe": self.recipe.name,
                "mlflow.note.content": self.recipe.description,
                **git_commit(),
            }
            tags |= {"firstlight.repeats": self.repeats.run_id} if self.repeats else {}
            params = {"code": code_version(), "store": self.store.hash}
            if self.place:
                tags, params = {**tags, **self.place.tags}, {**self.place.params, **params}
            run_id = self.tracking.start(self.recipe.name, self._recipe_file(), params, tags)
            self._mark(closed=False)
            self.tracking.client.log_dict(run_id, self.recipe.dump(), "recipe.json")
            self.open_runs.append(run_id)
            self.parent_run = run_id
        return self.parent_run

    def _recipe_file(self) -> Path:
        """What remembers the parent run, and whether it has its summary."""
        if self.place:
            return self.folder / RUN_FILE
        return (
            self.folder
            / "recipes"
            / f"{digest({'recipe': self.recipe.dump(), 'store': self.store.hash, 'code': code_version()})[:12]}.json"
        )

    def _mark(self, closed: bool) -> None:
        write_json(self._recipe_file(), {**remembered(self._recipe_file()), "closed": closed})

    def _left_open(self) -> bool:
        """Whether an earlier command did all the work and ended before its summary was published."""
        return not remembered(self._recipe_file()).get("closed", True)

    def fetch(self, only: str | None) -> None:
        """The encoders that the recipe refers to by name, before anything is run."""
        self.fetched = fetch(self.recipe, self.origin or self.tracking, self.folder / "inputs", only)

    def prepare(self) -> None:
        """Write or open the store; draw what is in it the first time."""
        if self.place and self.place.store:
            self.store = Store.open(self.place.store)
            self._check_store()
            return
        seen = Counted(self.console, "prepare")
        with seen:
            self.store = prepare(
                self.recipe.dataset, self.recipe.storage.resolve() / "stores", self.session.start, seen.advance
            )
            if self.store.extends:
                seen.remark = f" ({self.store.extends[-1].ids:,} of them in {self.store.extends[-1].name})"
        if self.repeats and self.store.hash != self.repeats.store:
            raise UserError(
                f"repeat: the images differ: this store has sha256 {self.store.hash}, that of the run had {self.repeats.store}"
            )
        instance = self._prepared()
        fresh = not (instance.folder / PUBLISHED).exists()
        self._tell_store(fresh)
        self._check_store()
        if fresh:
            self.outbox.put("prepare", lambda: self._publish_store(instance))

    def _check_store(self) -> None:
        """The recipe against the images that there are."""
        self.chain = Chain(
            self.recipe, self.folder, self.store.hash, self.fetched, self.place.passage if self.place else None
        )
        self.worker = Worker.start(self.recipe, self.store, on_ray=False)
        data_checks.check_images(self.recipe, self.worker.splits)
        needed = memory.check(self.recipe, self.store, len(self.worker.splits.train))
        if verbose():
            self.console.print(f"memory, estimated: {needed}", highlight=False, soft_wrap=True)

    def _prepared(self) -> Instance:
        return Instance("prepare", 0, self.store.hash[:12], self.folder / f"prepare-{self.store.hash[:12]}")

    def _tell_store(self, fresh: bool) -> None:
        """What is wrong with the images, and, the first time, what they are like."""
        for line in image_statistics.lines(self.store.images, self.store.splits) if fresh else ():
            self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        self._note(data_checks.wrong_with(self.recipe, self.store))

    def _note(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(f"[yellow]note[/] {escape(line)}", highlight=False, soft_wrap=True)

    def _publish_store(self, instance: Instance) -> None:
        store, client = self.store, self.tracking.client
        facts = {"store": store.path, "hash": store.hash, "classes": len(store.classes)}
        facts |= {"source": store.source["kind"], "root": self.recipe.dataset.root or self.recipe.dataset.list or ""}
        facts |= {"extends": store.extends[-1].name} if store.extends else {}
        run_id = self.tracking.start(
            "prepare",
            instance.folder / RUN_FILE,
            facts,
            {"mlflow.parentRunId": self.parent(), "firstlight.kind": "prepare"},
        )
        numbers = {
            **{f"images_{k}": n for k, n in store.splits.items()},
            "quarantined": store.quarantined,
            **store.images["duplicates"],
        }
        self.tracking.numbers(run_id, numbers)
        for name in (MANIFEST, QUARANTINE, DUPLICATES, *([SUBSETS] if store.subsets else [])):
            client.log_artifact(run_id, str(store.path / name))
        add_pictures(Album(self.tracking, run_id, instance.folder), self.worker)
        self.tracking.finish(run_id)
        write_json(instance.folder / PUBLISHED, {"run_id": run_id})

    def stage(self, name: str) -> None:
        """All seeds of one stage: what has finished stays, what was begun goes on."""
        mine = [self.chain.instance(name, seed) for seed in self.recipe.seeds]
        self.instances += mine
        waiting = [i for i in mine if i.result is None]
        publish = [i for i in mine if not (i.folder / PUBLISHED).exists()]
        self._open(publish)
        if waiting:
            self._work(name, waiting)
        for instance in publish:
            self.outbox.put(instance.label, partial(self._publish, instance))
        for instance in mine:
            if instance not in publish:
                self.console.print(
                    f"{instance.label}: finished before, unchanged ({run_of(instance.folder)})", highlight=False
                )

    def _open(self, publish: Sequence[Instance]) -> None:
        """Start the runs of a stage, so that they are seen while it works. Where MLflow is away they are started later."""
        try:
            for instance in publish:
                self._run(instance)
        except Away as error:
            self.outbox.tell(str(error))

    def _run(self, instance: Instance) -> str:
        """The run of an instance of this command, started when it is asked for first."""
        if instance.label not in self.stage_runs:
            run_id = self.tracking.start_stage(instance, self.parent(), self.store)
            self._log_origin(run_id, instance)
            self.open_runs.append(run_id)
            self.stage_runs[instance.label] = run_id
        return self.stage_runs[instance.label]

    def _publish(self, instance: Instance) -> None:
        """All that a finished instance has, into its run; the rows of its trainings that MLflow has not got, first."""
        stage, run_id = self.recipe.stages[instance.stage], self._run(instance)
        module = STAGES[stage.kind]
        for path, _, prefix in module.files(stage, instance):
            last = self.tracking.last_step(run_id, f"{prefix}loss")
            self.tracking.metrics(
                run_id, [row for row in read_metrics(path) if row["step"] >= last], prefix
            )  # of the last, a part may be there
        module.publish(self.tracking, run_id, self.worker, stage, instance)
        self.tracking.finish(run_id)
        self.open_runs.remove(run_id)
        write_json(instance.folder / PUBLISHED, {"run_id": run_id})

    def _last_step(self, instance: Instance, prefix: str) -> int:
        """-1 also where MLflow is away: rows that are logged twice stay one."""
        try:
            return self.tracking.last_step(self._run(instance), f"{prefix}loss")
        except Away as error:
            self.outbox.tell(str(error))
            return -1

    def _work(self, name: str, waiting: Sequence[Instance]) -> None:
        stage = self.recipe.stages[name]
        module = STAGES[stage.kind]
        followed = []
        for instance in waiting:
            instance.folder.mkdir(parents=True, exist_ok=True)
            for path, label, prefix in module.files(stage, instance):
                followed.append(
                    Followed(path, label, _Logger(self, instance, prefix), logged=self._last_step(instance, prefix))
                )
        self._note(data_checks.left_out(self.recipe, name, self.worker.splits))
        if isinstance(stage, Training):
            self._note(device_cache.choice(self.recipe.stream, self.store, len(self.worker.splits.train)))
        on_driver = getattr(module, "ON_DRIVER", False)
        on_ray = self.session.start() if not on_driver or module.WITH_RAY else False
        with Follow(self.console, name, followed, self.place.listener if self.place else None):
            if not on_driver:
                launch(self.recipe, self.store, module.work, waiting)
                return
            worker = Worker.start(self.recipe, self.store, on_ray)
            for instance in waiting:
                with attempt(instance.folder, worker.device):
                    module.work(worker, stage, instance)

    def _log_origin(self, run_id: str, instance: Instance) -> None:
        stage = self.recipe.stages[instance.stage]
        if not isinstance(stage, Downstream) or not stage.takes_encoder:
            return
        if stage.encoder == "previous":
            upstream = self.chain.previous(instance.stage, instance.seed)
            made_by = run_of(upstream.folder) or self._run(upstream)
            self.tracking.log_consumed(run_id, f"runs:/{made_by}/encoder", made_by)
        else:
            reference = self.fetched.references[instance.stage][0]
            self.tracking.log_consumed(run_id, reference, (self.origin or self.tracking).source_run(reference))

    def write_cards(self) -> None:
        """The card of every encoder that this command exported, or found exported, with what is known of it by now."""
        for instance in (i for i in self.instances if isinstance(self.recipe.stages[i.stage], Export)):
            stage = self.recipe.stages[instance.stage]
            assert isinstance(stage, Export)
            made = (
                f"runs:/{run_of(self.chain.previous(instance.stage, instance.seed).folder)}"
                if stage.encoder == "previous"
                else self.fetched.references[instance.stage][0]
            )
            lineage = {"encoder": made, "export": f"runs:/{run_of(instance.folder)}"}
            text = model_card.write(self.worker, instance, self.chain.siblings(instance), lineage)
            if text is not None:
                file = instance.folder / export.FOLDER / model_card.CARD
                try:
                    self.tracking.log_card(run_of(instance.folder) or self._run(instance), file, text, export.FOLDER)
                except Away:
                    file.unlink()  # one that stands there has been published
                    raise

    def close(self, found: list[Row]) -> None:
        """The summary into the parent run, if there is one."""
        if self.parent_run is None and not self.instances:
            self.console.print(f"the store is whole: {self.store.path}", soft_wrap=True)
            return
        if self.parent_run is None and not self.outbox.waiting and not self._left_open():
            self.console.print("every stage has finished before and nothing has changed: nothing was run")
            return
        self.outbox.put("the summary", lambda: self._close(self.parent(), found))

    def _close(self, run_id: str, found: list[Row]) -> None:
        paired = [row for row in found if row.baseline]
        for row in paired:
            key = re.sub(r"[^\w\-.: /]", "", f"{row.stage}/{row.measure}".replace("@", "_at_"))  # what MLflow allows
            for seed, a, b in zip(self.recipe.seeds, row.pretrained, row.baseline, strict=True):
                self.tracking.numbers(run_id, {"pretrained": a, "baseline": b}, f"{key}/seed{seed}/")
            self.tracking.numbers(run_id, {"mean_gain_percent": float(row.gain.mean())}, f"{key}/")
        if paired:
            album = Album(self.tracking, run_id, self.folder / run_report.SUMMARY)
            told = "test scores of the pretrained network and of the same network without pretraining"
            album.add("comparison", figures.comparison([facts(self.recipe, row) for row in paired]), told)
        if found:
            self.tracking.client.log_dict(run_id, {"rows": [facts(self.recipe, row) for row in found]}, "table.json")
        for name in dict.fromkeys(i.stage for i in self.instances):
            self.tracking.log_stage(
                run_id, name, [run for i in self.instances if i.stage == name and (run := run_of(i.folder))]
            )
        self.tracking.finish(run_id)
        self.open_runs.remove(run_id)
        self._mark(closed=True)

    def settle(self, found: list[Row]) -> None:
        """Raises `Unpublished`, with the rows of the table, where MLflow does not come back."""
        try:
            self.outbox.settle()
        except Unpublished as error:
            error.found = tuple(found)
            raise

    def write_page(self, error: BaseException | None = None) -> tuple[Path, str | None]:
        """The report of all that is known of the recipe, of this command and of those before, as a file; and the parent run, if there is one."""
        parent = self.parent_run or remembered(self._recipe_file()).get("run_id")
        known = [instance for name in self.recipe.stages for instance in self.chain.begun(name)]
        references = {name: reference for name, (reference, _) in self.fetched.references.items()}
        told = None if error is None else run_report.told(error)
        prepared = self._prepared().folder
        ran = run_report.Ran(
            self.worker,
            self.folder,
            known,
            rows(self.recipe, known),
            references,
            parent,
            prepared,
            self.tracking.uri,
            told,
        )
        return run_report.write(ran), parent

    def report(self) -> None:
        """Write the page; that it could not be written makes nothing of the results undone."""
        try:
            file, parent = self.write_page()
        except OSError as error:
            self._note([f"the report is not whole: {' '.join(str(error).split())[:200]}"])
            return
        if parent is not None:
            self.outbox.put("the report", lambda: self.tracking.client.log_artifact(parent, str(file)))

    def abandon(self, error: BaseException) -> None:
        """Close the runs that were open, as KILLED or FAILED, but those of a training that pauses; where stages were begun, what is known so far
        is on a page. The next `run` goes on."""
        if isinstance(error, Paused):
            return
        with contextlib.suppress(Exception):  # MLflow may be what failed; the first error is the one to show
            if self.instances and not isinstance(error, Unpublished):
                file, parent = self.write_page(error)
                self.console.print(f"what is known so far: {file}", soft_wrap=True, highlight=False)
                if parent is not None:
                    self.tracking.client.log_artifact(parent, str(file))
        with contextlib.suppress(Exception):
            for run_id in self.open_runs:
                self.tracking.finish(run_id, "KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")


class _Logger:
    """Hands rows of one metrics file on to MLflow, as they come."""

    def __init__(self, runner: _Runner, instance: Instance, prefix: str) -> None:
        self.runner, self.instance, self.prefix = runner, instance, prefix

    def __call__(self, new: list[dict[str, Any]]) -> None:
        self.runner.tracking.offer(self.runner._run(self.instance), new, self.prefix)
