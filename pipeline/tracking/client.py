"""MLflow: one parent run per recipe, one child run per stage and seed. Only the driver writes; workers leave their numbers in files."""

import contextlib
import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_path, write_json
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.location import Records
from firstlight.pipeline.tracking.retry import Away, Patient, hasty, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from firstlight.pipeline.config.recipe import Recipe

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # MLflow's 7 try a dead server for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # s
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

RUN_FILE = "mlflow.json"
CURRENT = "current"  # the alias of the last model that a recipe registered under a name
ENCODER, ENCODER_RUN = (
    "firstlight.encoder",
    "firstlight.encoder_run",
)  # tags: what a stage consumed, and the run that made it
STAGE_RUNS = "firstlight.runs."  # and the name of a stage: tag of a recipe's run, the ids of the stage's runs by seed
NOTE = 8000  # characters of a tag
KEY = "firstlight.key"  # a tag


def tracking_uri(recipe: "Recipe") -> str:
    return Records.of(recipe).uri


def check_uri(uri: str) -> None:
    """Raises UserError for what MLflow keeps no runs in."""
    if uri.startswith("file:") or "://" not in uri:
        raise UserError(
            f"tracking.uri: {uri!r} is not valid: MLflow keeps runs in a database or behind a server: sqlite:///... or http://..."
        )


class Tracking:
    """The MLflow runs of one recipe.

    Raises:
        UserError: the tracking server or database cannot be reached; names `tracking.uri`.
    """

    def __init__(self, recipe: "Recipe", records: Records | None = None) -> None:
        """`records`: where they are, if not where the recipe says."""
        import mlflow

        self.recipe, self.records = recipe, records or Records.of(recipe)
        self.uri = self.records.uri
        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        check_uri(self.uri)
        try:
            with (
                hasty(),
                _locked(_meeting(self.records)),
            ):  # two first users of one SQLite file would both create its tables
                if self.records.database is not None and not self.records.database.exists():
                    _create(self.records.database)
                mlflow.set_tracking_uri(self.uri)
                self.impatient = mlflow.MlflowClient(self.uri)
                self.experiment = self._experiment()
        except Exception as error:
            raise UserError(f"tracking.uri: {self.uri!r} cannot be used: {reason(error)}") from None
        self.client = cast("MlflowClient", Patient(self.impatient))

    def _experiment(self) -> str:
        import mlflow

        name = self.records.experiment
        found = self.impatient.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        place = str(self.records.storage / "mlartifacts") if self.uri.startswith("sqlite:") else None
        try:
            return str(self.impatient.create_experiment(name, place))
        except mlflow.MlflowException:
            found = self.impatient.get_experiment_by_name(name)  # on a server, another may have been first
            if found is None:
                raise
            return str(found.experiment_id)

    def start(self, name: str, file: Path, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """The id of the run that `file` remembers, running again; or of a new one, which `file` then remembers.

        A run has a key, which the file has before the run is there: a process that is killed in between leaves no run that nobody knows.
        """
        known = remembered(file)
        run_id = known.get("run_id") or self._by_key(known.get("key"))
        if run_id is None or not self._revived(run_id, tags):
            known = {"key": uuid.uuid4().hex}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
            run_id = str(
                self.client.create_run(self.experiment, run_name=name, tags={**tags, KEY: known["key"]}).info.run_id
            )
        if "run_id" not in known:
            self._log_params(run_id, params)
            write_json(file, {**known, "run_id": run_id, "tracking_uri": self.uri})
        return run_id

    def _by_key(self, key: str | None) -> str | None:
        found = self.client.search_runs([self.experiment], f"tags.{KEY} = '{key}'", max_results=1) if key else []
        return str(found[0].info.run_id) if found else None

    def _revived(self, run_id: str, tags: Mapping[str, str]) -> bool:
        import mlflow

        try:
            self.client.update_run(run_id, status="RUNNING")
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)
        except mlflow.MlflowException:  # another tracking store, or a deleted run
            return False
        return True

    def start_stage(self, instance: StageInstance, parent: str, store: Store) -> str:
        """A child run of `parent`, with the stage's whole configuration and the store that it reads."""
        stage = self.recipe.stages[instance.stage]
        sections = {
            "stage": stage,
            "dataset": self.recipe.dataset,
            "encoder": self.recipe.encoder,
            "stream": self.recipe.stream,
        }
        params = {"seed": instance.seed, "fingerprint": instance.fingerprint}
        params |= {
            f"{name}.{key}": v
            for name, section in sections.items()
            for key, v in _flat(section.model_dump(mode="json"))
        }
        tags = {"mlflow.parentRunId": parent, "firstlight.stage": instance.stage, "firstlight.kind": stage.kind}
        run_id = self.start(instance.label, instance.folder / RUN_FILE, params, tags)
        self._log_store(run_id, store, stage.kind)  # MLflow has it once, however often it is told
        return run_id

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Those that the run has not got: a process that was killed may have logged some, and MLflow takes no other value for them."""
        from mlflow.entities import Param

        there = self.client.get_run(run_id).data.params
        rows = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in there]
        for k in range(0, len(rows), 100):
            self.client.log_batch(run_id, params=rows[k : k + 100])

    def _log_store(self, run_id: str, store: Store, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(store.splits)
        dataset = Dataset(
            store.path.name,
            store.hash[:36],
            "local",
            json.dumps({"uri": str(store.path), "sha256": store.hash}),
            None,
            profile,
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def metrics(self, run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Rows with `step`, `time` (s) and numbers by name. A row that is there already stays one."""
        self._log_rows(self.client, run_id, rows, prefix)

    def offer(self, run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """The same, once and in haste: it raises whatever MLflow raises."""
        with hasty():
            self._log_rows(self.impatient, run_id, rows, prefix)

    def _log_rows(self, client: "MlflowClient", run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
        from mlflow.entities import Metric

        skip = ("step", "time", "of")
        batch = [
            Metric(prefix + key, float(value), int(row["time"] * 1000), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if key not in skip
        ]
        for k in range(0, len(batch), 1000):
            client.log_batch(run_id, metrics=batch[k : k + 1000])

    def numbers(self, run_id: str, values: Mapping[str, float], prefix: str = "") -> None:
        """Results that have no step."""
        self.metrics(run_id, [{"step": 0, "time": time.time(), **values}], prefix)

    def last_step(self, run_id: str, key: str) -> int:
        """The last step logged under `key`, -1 for none: a resumed stage goes on behind it."""
        return max((m.step for m in self.client.get_metric_history(run_id, key)), default=-1)

    def log_encoder(self, run_id: str, folder: Path, instance: StageInstance, register_as: str | None) -> str:
        """The encoder as the artifact `encoder` and as a logged model, the run's one output; its `models:/...` reference."""
        from mlflow.entities import LoggedModelOutput

        self.client.log_artifacts(run_id, str(folder), "encoder")
        model_id = self.model_of(run_id)
        if model_id is None:
            tags = {"seed": str(instance.seed), "fingerprint": instance.fingerprint}
            begun = self.client.search_logged_models(
                [self.experiment], f"source_run_id = '{run_id}'", max_results=1
            )  # and not finished
            model = begun[0] if begun else self._new_model(run_id, tags)
            model_id = str(model.model_id)
            self.client.log_model_artifacts(model_id, str(folder))
            self.client.finalize_logged_model(model_id, "READY")
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
        if register_as:
            register(self.client, register_as, model_id, run_id)
        return f"models:/{model_id}"

    def _new_model(self, run_id: str, tags: dict[str, str]) -> Any:
        return self.client.create_logged_model(
            self.experiment, name="encoder", source_run_id=run_id, tags=tags, model_type="encoder"
        )

    def promote(self, run_id: str, name: str, alias: str) -> str:
        """Register the encoder that a pretraining's run has logged; its reference, `models:/name@alias`."""
        model_id = self.model_of(run_id)
        assert model_id is not None
        register(self.client, name, model_id, run_id, alias)
        return f"models:/{name}@{alias}"

    def model_of(self, run_id: str) -> str | None:
        """The logged model that a run has put out."""
        outputs = self.client.get_run(run_id).outputs
        return next((model.model_id for model in (outputs.model_outputs if outputs else None) or ()), None)

    def log_stage(self, run_id: str, stage: str, runs: Sequence[str]) -> None:
        """Which runs a recipe's stage consists of, also where another recipe run has made them: its lineage and its repetition need them."""
        key = STAGE_RUNS + re.sub(r"[^\w\-.: /]", "", stage)
        self.client.set_tag(run_id, key, " ".join(runs))

    def log_card(self, run_id: str, file: Path, text: str, folder: str) -> None:
        """A model card as artifact, and as what MLflow shows on the run's page: up to the last section that a tag has room for."""
        self.client.log_artifact(run_id, str(file), folder)
        if len(text) > NOTE:
            end = text.rfind("\n#", 0, NOTE - 100)
            text = f"{text[:end]}\n\nThe rest is in the artifact {folder}/{file.name}.\n"
        self.client.set_tag(run_id, "mlflow.note.content", text)

    def log_consumed(self, run_id: str, reference: str, made_by: str) -> None:
        """The encoder that a run starts from: its pinned reference, the run that made it, and its model as an input in MLflow's own terms."""
        import mlflow
        from mlflow.entities import LoggedModelInput

        self.client.set_tag(run_id, ENCODER, reference)
        self.client.set_tag(run_id, ENCODER_RUN, made_by)
        with contextlib.suppress(mlflow.MlflowException):  # that run was deleted, or is kept elsewhere
            model_id = self.model_of(made_by)
            if model_id is not None:
                self.client.log_inputs(run_id, models=[LoggedModelInput(model_id)])

    def pin(self, reference: str, where: str) -> str:
        """An alias moves: `models:/name@alias` -> `models:/name/version`. A run may be named by the beginning of its id: `runs:/4c81ab12/encoder`.

        Raises:
            UserError: there is no such model, alias or run.
        """
        import mlflow

        kind, _, path = reference.partition(":/")
        name, at, alias = path.partition("@")
        try:
            if kind == "runs":
                return self._whole(reference, where)
            if not at:
                return reference
            return f"models:/{name}/{self.client.get_model_version_by_alias(name, alias).version}"
        except (mlflow.MlflowException, Away) as error:
            raise UserError(
                f"{where}: {reference!r} is not in {self.uri}: {str(error).splitlines()[0][:200]}"
            ) from None

    def _whole(self, reference: str, where: str) -> str:
        begun, _, path = reference.removeprefix("runs:/").partition("/")
        if len(begun) == 32 or not begun.isalnum():
            return reference
        found = [
            run.info.run_id
            for run in self.client.search_runs([self.experiment], f"attributes.run_id LIKE '{begun}%'", max_results=2)
        ]
        if len(found) != 1:
            raise UserError(
                f"{where}: {reference!r}: {'several runs begin' if found else 'no run begins'} with {begun!r} in {self.uri}"
            )
        return f"runs:/{found[0]}/{path}"

    def beside(self, reference: str, name: str, where: str) -> str:
        """The reference of a network that the run of an encoder has handed on beside it: `runs:/<run>/<name>`.

        Raises:
            UserError: the run has none of this name; names the run, and what it has.
        """
        import mlflow

        try:
            run_id = self.source_run(reference)
            has = sorted(
                entry.path for entry in self.client.list_artifacts(run_id) if entry.is_dir and entry.path != "figures"
            )
        except (mlflow.MlflowException, Away) as error:
            raise UserError(
                f"{where}: {reference!r} is not in {self.uri}: {str(error).splitlines()[0][:200]}"
            ) from None
        if name not in has:
            raise UserError(
                f"{where}: {name!r} is not valid: run {run_id}, which made {reference!r}, has {', '.join(has) or 'nothing'}"
            )
        return f"runs:/{run_id}/{name}"

    def source_run(self, reference: str) -> str:
        """The run that made what a pinned reference leads to."""
        kind, _, path = reference.partition(":/")
        name, _, version = path.partition("/")
        if kind == "runs":
            return name
        return str(
            self.client.get_model_version(name, version).run_id
            if version
            else self.client.get_logged_model(name).source_run_id
        )

    def fetch(self, reference: str, target: Path, where: str) -> Path:
        """The folder behind `runs:/...` or `models:/...`, copied into `target`.

        Raises:
            UserError: nothing is there; names `where` and the reference.
        """
        import mlflow

        target.mkdir(parents=True, exist_ok=True)
        try:
            return Path(
                mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=str(target), tracking_uri=self.uri)
            )
        except Exception as error:
            raise UserError(
                f"{where}: {reference!r} is not in {self.uri}: {str(error).splitlines()[0][:200]}"
            ) from None

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        self.client.set_terminated(run_id, status)


def run_of(folder: Path) -> str | None:
    """The run that a folder remembers in `RUN_FILE`; None where none was started."""
    return remembered(folder / RUN_FILE).get("run_id")


def remembered(file: Path) -> dict[str, Any]:
    """What `Tracking.start` has noted in a file; {} where nothing was started."""
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def register(client: "MlflowClient", name: str, model_id: str, run_id: str, alias: str = CURRENT) -> str:
    """`models:/<name>/<version>` of the model, new or the one that it has under this name; `alias` leads to it from now on."""
    import mlflow

    with contextlib.suppress(mlflow.MlflowException):  # it exists
        client.create_registered_model(name)
    mine = [v.version for v in client.search_model_versions(f"name='{name}'") if v.run_id == run_id]
    version = (
        mine[0]
        if mine
        else client.create_model_version(name, f"models:/{model_id}", run_id=run_id, model_id=model_id).version
    )
    client.set_registered_model_alias(name, alias, str(version))
    return f"models:/{name}/{version}"


def _create(database: Path) -> None:
    """MLflow's tables, under another name until all of them are there: a process that is killed before leaves none that cannot be used."""
    import mlflow

    with atomic_path(database) as temporary:
        mlflow.MlflowClient(f"sqlite:///{temporary}").search_experiments()


def _meeting(records: Records) -> Path:
    """The folder of the database, so that all its users meet at one lock."""
    return records.storage if records.database is None else records.database.resolve().parent


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".mlflow.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
