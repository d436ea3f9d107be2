"""A recipe: its stages chained by artifact, each one resumed where it stopped, and none that has finished done twice."""

import contextlib
import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline import card, census, embed, enough, evaluate, export, figures, finetune, memory, overlay, preflight, pretrain, resident, retrieve
from pipeline.config import Downstream, Export, Finetune, Look, Recipe, Training, digest
from pipeline.durable import write_json
from pipeline.errors import UserError
from pipeline.features import check_head
from pipeline.follow import Counted, Follow, Followed
from pipeline.handover import check_same, encoder_spec, load_decoder, load_head
from pipeline.launch import launch
from pipeline.metrics import read_metrics
from pipeline.patience import Away, Outbox, Unpublished
from pipeline.prepare import prepare
from pipeline.records import Records
from pipeline.report import Row, facts, rows
from pipeline.session import Session, verbose
from pipeline.splits import spread
from pipeline.stage import Instance, code_version, git_commit
from pipeline.store import DUPLICATES, MANIFEST, QUARANTINE, SUBSETS, Store
from pipeline.subsets import lost_images
from pipeline.tracking import RUN_FILE, Tracking
from pipeline.worker import Worker

STAGES: dict[str, ModuleType] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "finetune": finetune,
    "retrieve": retrieve,
    "embed": embed,
    "export": export,
}
DECIDE_NOTHING = {"log_every", "checkpoint_every", "register_as", "watch"}  # settings that leave the result as it is
PUBLISHED = "published.json"


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
    preflight.check(recipe)
    with _lock(recipe), Session(recipe.scale, recipe.stream) as session:
        runner = _Runner(recipe, session, console, repeats)
        try:
            runner.resolve(only)
            runner.prepare()
            for name, stage in recipe.stages.items():
                if only in (None, stage.kind):
                    runner.stage(name)
            found = rows(recipe, runner.instances)
            if any(isinstance(stage, Export) for stage in recipe.stages.values()):
                runner.outbox.put("the model cards", runner.write_cards)
            runner.close(found)
            runner.settle(found)
            return found
        except BaseException as error:
            runner.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise


@contextlib.contextmanager
def _lock(recipe: Recipe) -> Iterator[None]:
    """One run of a name at a time; the lock goes with the process, however it ends."""
    folder = recipe.storage / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"name: {recipe.name!r} is being run by process {file.read().strip() or '?'}; wait for it, or give another name="
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class _Runner:
    """The state of one `firstlight run`: store, MLflow runs, and the instances so far."""

    def __init__(self, recipe: Recipe, session: Session, console: Console, repeats: Repeats | None = None) -> None:
        self.recipe, self.session, self.console, self.repeats = recipe, session, console, repeats
        self.folder = recipe.storage.resolve() / recipe.name
        self.origin = Tracking(recipe, repeats.origin) if repeats else None  # before the other: MLflow's global setting is that of the last
        self.tracking = Tracking(recipe)
        self.instances: list[Instance] = []
        self.references: dict[str, tuple[str, Path]] = {}  # stage -> the pinned reference of its encoder, and the folder it was fetched to
        self.networks: dict[str, Path] = {}  # stage -> the folder that the head or decoder beside that encoder was fetched to
        self.outbox = Outbox(self.tracking.uri, console)
        self.open_runs: list[str] = []
        self.stage_runs: dict[str, str] = {}  # label of an instance -> its run, of this command
        self.parent_run: str | None = None

    def parent(self) -> str:
        """The parent run, started when the first stage has something to do."""
        if self.parent_run is None:
            tags = {"firstlight.recipe": self.recipe.name, "mlflow.note.content": self.recipe.description, **git_commit()}
            tags |= {"firstlight.repeats": self.repeats.run_id} if self.repeats else {}
            run_id = self.tracking.start(self.recipe.name, self._recipe_file(), {"code": code_version(), "store": self.store.hash}, tags)
            self._mark(closed=False)
            self.tracking.client.log_dict(run_id, self.recipe.dump(), "recipe.json")
            self.open_runs.append(run_id)
            self.parent_run = run_id
        return self.parent_run

    def _recipe_file(self) -> Path:
        """What remembers the parent run, and whether it has its summary."""
        return self.folder / "recipes" / f"{digest({'recipe': self.recipe.dump(), 'store': self.store.hash, 'code': code_version()})[:12]}.json"

    def _mark(self, closed: bool) -> None:
        write_json(self._recipe_file(), {**json.loads(self._recipe_file().read_text("utf-8")), "closed": closed})

    def _left_open(self) -> bool:
        """Whether an earlier command did all the work and ended before its summary was published."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return not json.loads(self._recipe_file().read_text("utf-8"))["closed"]
        return False

    def resolve(self, only: str | None) -> None:
        """Fetch the encoders that the recipe refers to by name, before anything is run."""
        for name, stage in self.recipe.stages.items():
            if isinstance(stage, Downstream) and stage.takes_encoder and stage.encoder != "previous" and only in (None, stage.kind):
                where = f"stages.{name}.encoder"
                kept_in = self.origin or self.tracking
                reference = kept_in.pin(stage.encoder, where)
                folder = kept_in.fetch(reference, self.folder / "inputs" / digest(reference)[:12], where)
                check_same(folder, self.recipe.encoder.model_dump(mode="json"), where)
                self.references[name] = (reference, folder)
                if wanted := _beside(stage):
                    self.networks[name] = self._fetched_beside(wanted, reference, f"stages.{name}")

    def _fetched_beside(self, wanted: str, reference: str, where: str) -> Path:
        key = f"{where}.features" if wanted == "head" else f"{where}.arms"
        kept_in = self.origin or self.tracking
        beside = kept_in.beside(reference, wanted, key)
        folder = kept_in.fetch(beside, self.folder / "inputs" / digest(beside)[:12], key)
        if wanted == "head":
            check_head(load_head(folder), self.recipe, where)
        return folder

    def prepare(self) -> None:
        """Write or open the store; draw what is in it the first time."""
        seen = Counted(self.console, "prepare")
        with seen:
            self.store = prepare(self.recipe.dataset, self.recipe.storage.resolve() / "stores", self.session.start, seen.advance)
            if self.store.extends:
                seen.remark = f" ({self.store.extends[-1].ids:,} of them in {self.store.extends[-1].name})"
        if self.repeats and self.store.hash != self.repeats.store:
            raise UserError(f"repeat: the images differ: this store has sha256 {self.store.hash}, that of the run had {self.repeats.store}")
        instance = Instance("prepare", 0, self.store.hash[:12], self.folder / f"prepare-{self.store.hash[:12]}")
        fresh = not (instance.folder / PUBLISHED).exists()
        self._tell_store(fresh)
        self.worker = Worker.start(self.recipe, self.store, on_ray=False)
        enough.check_images(self.recipe, self.worker.splits)
        needed = memory.check(self.recipe, self.store, len(self.worker.splits.train))
        if verbose():
            self.console.print(f"memory, estimated: {needed}", highlight=False, soft_wrap=True)
        if fresh:
            self.outbox.put("prepare", lambda: self._publish_store(instance))

    def _tell_store(self, fresh: bool) -> None:
        """What is wrong with the images, and, the first time, what they are like."""
        store, copies = self.store, self.store.images["duplicates"]
        for line in census.lines(store.images, store.splits) if fresh else ():
            self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        notes = [f"{self.recipe.dataset.list or self.recipe.dataset.root}: {store.source['aside']}"] if "aside" in store.source else []
        if store.quarantined:
            notes.append(f"{store.quarantined:,} images cannot be decoded, listed in {store.path / QUARANTINE}")
        if lost := lost_images(store.subsets):
            notes.append(f"subsets are smaller by images that cannot be decoded: {', '.join(lost)}")
        if copies["copies"]:
            both = f"{copies['of_train_in_test']:,} of them test images that are also in train, "
            notes.append(f"{copies['copies']:,} images are copies of others, {both}listed in {store.path / DUPLICATES}")
        self._note(notes)

    def _note(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(f"[yellow]note[/] {escape(line)}", highlight=False, soft_wrap=True)

    def _publish_store(self, instance: Instance) -> None:
        store, client = self.store, self.tracking.client
        facts = {"store": store.path, "hash": store.hash, "classes": len(store.classes)}
        facts |= {"source": store.source["kind"], "root": self.recipe.dataset.root or self.recipe.dataset.list or ""}
        facts |= {"extends": store.extends[-1].name} if store.extends else {}
        run_id = self.tracking.start(
            "prepare", instance.folder / RUN_FILE, facts, {"mlflow.parentRunId": self.parent(), "firstlight.kind": "prepare"}
        )
        numbers = {**{f"images_{k}": n for k, n in store.splits.items()}, "quarantined": store.quarantined, **store.images["duplicates"]}
        self.tracking.numbers(run_id, numbers)
        for name in (MANIFEST, QUARANTINE, DUPLICATES, *([SUBSETS] if store.subsets else [])):
            client.log_artifact(run_id, str(store.path / name))
        client.log_figure(run_id, figures.census(store.images, store.quarantined), "figures/images.png")
        client.log_figure(run_id, _sample(self.worker), "figures/sample.png")
        for name, figure in _class_figures(store, self.worker).items():
            client.log_figure(run_id, figure, f"figures/{name}.png")
        self.tracking.finish(run_id)
        write_json(instance.folder / PUBLISHED, {"run_id": run_id})

    def stage(self, name: str) -> None:
        """All seeds of one stage: what has finished stays, what was begun goes on."""
        mine = [self._instance(name, seed) for seed in self.recipe.seeds]
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
                self.console.print(f"{instance.label}: finished before, unchanged ({_run_of(instance)})", highlight=False)

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
            self.tracking.metrics(run_id, [row for row in read_metrics(path) if row["step"] >= last], prefix)  # of the last, a part may be there
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
                followed.append(Followed(path, label, _Logger(self, instance, prefix), logged=self._last_step(instance, prefix)))
        self._note(enough.left_out(self.recipe, name, self.worker.splits))
        if isinstance(stage, Training):
            self._note(resident.choice(self.recipe.stream, self.store, len(self.worker.splits.train)))
        on_driver = getattr(module, "ON_DRIVER", False)
        on_ray = self.session.start() if not on_driver or module.WITH_RAY else False
        with Follow(self.console, name, followed):
            if not on_driver:
                launch(self.recipe, self.store, module.work, waiting)
                return
            worker = Worker.start(self.recipe, self.store, on_ray)
            for instance in waiting:
                module.work(worker, stage, instance)

    def _instance(self, name: str, seed: int) -> Instance:
        """Found by all that decides its result. The number of workers does not."""
        recipe, stage = self.recipe, self.recipe.stages[name]
        decides: dict[str, Any] = {
            "stage": {k: v for k, v in stage.model_dump(mode="json").items() if k not in DECIDE_NOTHING},
            "dataset": recipe.dataset.model_dump(mode="json", exclude={"root", "download", "extends"}),
            "encoder": recipe.encoder.model_dump(mode="json"),
            "order": recipe.stream.model_dump(include={"window", "shuffle"}),
            "seed": seed,
            "store": self.store.hash,
            "code": code_version(),
        }
        encoder = None
        if isinstance(stage, Downstream) and stage.takes_encoder:
            encoder = self._encoder(name, stage, seed)
            decides["from"] = digest(json.loads((encoder / "manifest.json").read_text("utf-8")))
        beside = None
        if isinstance(stage, Downstream) and (wanted := _beside(stage)):
            beside = self.networks[name] if stage.encoder != "previous" else self._previous(name, seed).folder / wanted
            (load_head if wanted == "head" else load_decoder)(beside)
            decides[wanted] = digest(json.loads((beside / "manifest.json").read_text("utf-8")))
        fingerprint = digest(decides)[:12]
        return Instance(name, seed, fingerprint, self.folder / f"{name}-seed{seed}-{fingerprint}", encoder, beside)

    def _encoder(self, name: str, stage: Downstream, seed: int) -> Path:
        """The folder of the encoder that a downstream stage starts from, its files checked."""
        if stage.encoder != "previous":
            return self.references[name][1]
        upstream = self._previous(name, seed)
        try:
            encoder_spec(upstream.folder / "encoder")
        except UserError as error:
            raise UserError(f"{error}; delete {upstream.folder} and run again: {upstream.label} is made anew from its seed") from None
        return upstream.folder / "encoder"

    def _previous(self, name: str, seed: int) -> Instance:
        before = list(self.recipe.stages)[: list(self.recipe.stages).index(name)]
        upstream = next(s for s in reversed(before) if self.recipe.stages[s].kind == "pretrain")
        instance = self._instance(upstream, seed)
        if instance.result is None:
            raise UserError(f"stages.{name}.encoder: 'previous' is {instance.label}, which has not finished; run it first: firstlight pretrain ...")
        return instance

    def _log_origin(self, run_id: str, instance: Instance) -> None:
        stage = self.recipe.stages[instance.stage]
        if not isinstance(stage, Downstream) or not stage.takes_encoder:
            return
        if stage.encoder == "previous":
            upstream = self._previous(instance.stage, instance.seed)
            made_by = _run_of(upstream) if (upstream.folder / RUN_FILE).exists() else self._run(upstream)
            self.tracking.log_consumed(run_id, f"runs:/{made_by}/encoder", made_by)
        else:
            reference = self.references[instance.stage][0]
            self.tracking.log_consumed(run_id, reference, (self.origin or self.tracking).source_run(reference))

    def write_cards(self) -> None:
        """The card of every encoder that this command exported, or found exported, with what is known of it by now."""
        for instance in (i for i in self.instances if isinstance(self.recipe.stages[i.stage], Export)):
            stage = self.recipe.stages[instance.stage]
            assert isinstance(stage, Export)
            made = (
                f"runs:/{_run_of(self._previous(instance.stage, instance.seed))}"
                if stage.encoder == "previous"
                else self.references[instance.stage][0]
            )
            lineage = {"encoder": made, "export": f"runs:/{_run_of(instance)}"}
            text = card.write(self.worker, instance, self._siblings(instance), lineage)
            if text is not None:
                file = instance.folder / export.FOLDER / card.CARD
                try:
                    self.tracking.log_card(_run_of(instance), file, text, export.FOLDER)
                except Away:
                    file.unlink()  # one that stands there has been published
                    raise

    def _siblings(self, instance: Instance) -> list[Instance]:
        """The finished instances, of this command or of one before, of all stages that score the encoder of `instance` or of another seed of it."""
        found = []
        for name, stage in self.recipe.stages.items():
            with contextlib.suppress(UserError, KeyError):  # a stage whose encoder is not there, or was not fetched for this command
                mine = [self._instance(name, seed) for seed in self.recipe.seeds] if isinstance(stage, Downstream) else []
                if any(i.seed == instance.seed and i.encoder == instance.encoder for i in mine):
                    found += [i for i in mine if i.result is not None]
        return found

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
            self.tracking.client.log_figure(run_id, figures.comparison([facts(self.recipe, row) for row in paired]), "figures/comparison.png")
        if found:
            self.tracking.client.log_dict(run_id, {"rows": [facts(self.recipe, row) for row in found]}, "table.json")
        for name in dict.fromkeys(i.stage for i in self.instances):
            self.tracking.log_stage(run_id, name, [_run_of(i) for i in self.instances if i.stage == name and (i.folder / RUN_FILE).exists()])
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

    def abandon(self, status: str) -> None:
        """Close the runs that were open, as KILLED or FAILED; the next `run` opens them again."""
        with contextlib.suppress(Exception):  # MLflow may be what failed; the first error is the one to show
            for run_id in self.open_runs:
                self.tracking.finish(run_id, status)


class _Logger:
    """Hands rows of one metrics file on to MLflow, as they come."""

    def __init__(self, runner: _Runner, instance: Instance, prefix: str) -> None:
        self.runner, self.instance, self.prefix = runner, instance, prefix

    def __call__(self, new: list[dict[str, Any]]) -> None:
        self.runner.tracking.offer(self.runner._run(self.instance), new, self.prefix)


def _beside(stage: Downstream) -> str | None:
    """The name of the network that a stage needs besides the encoder."""
    if isinstance(stage, Look) and stage.features == "head":
        return "head"
    return "decoder" if isinstance(stage, Finetune) and "pretrained_decoder" in stage.arms else None


def _run_of(instance: Instance) -> str:
    return str(json.loads((instance.folder / RUN_FILE).read_text("utf-8"))["run_id"])


def _class_figures(store: Store, worker: Worker) -> dict[str, Any]:
    """Pictures by name: images per class, or, of annotations, what the census counted per class, and images with them drawn."""
    names = list(store.splits)
    found = {}
    if store.classes and not store.annotations:
        labels = [Counter(store.labels(name).tolist()) for name in names]
        found["classes"] = figures.counts({c: [part[k] for part in labels] for k, c in enumerate(store.classes)}, names)
    annotated = store.images.get("annotated", {})
    for kind, title in (("present", "images in which a class occurs"), ("boxes", "boxes per class"), ("pixels", "pixels of masks per class")):
        if kind in {kind for split in annotated.values() for kind in split}:
            by_split = [annotated.get(name, {}).get(kind, {}) for name in names]
            found[f"classes_{kind}"] = figures.counts({c: [n.get(str(k), 0) for n in by_split] for k, c in enumerate(store.classes)}, names, title)
    if store.annotations:
        found["annotations"] = overlay.sample(store, spread(worker.splits.train, 8), f"{store.path.name}: {', '.join(store.annotations)}")
    return found


def _sample(worker: Worker) -> Any:
    """Up to 32 training images, as the evaluation crops them."""
    ids = spread(worker.splits.train, 32)
    loader = worker.loader([worker.recipe.dataset.eval_augment], 0)
    batch = loader.once(ids)
    names = [worker.store.classes[k] if k >= 0 else "" for k in batch["label"].tolist()]
    return figures.images(list(batch["views"][:, 0]), names, f"{worker.store.path.name}: training images")
