"""MLflow: one parent run per recipe, one child run per stage and seed. Only the driver writes; workers leave their numbers in files."""

import contextlib
import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Recipe
from pipeline.durable import write_json
from pipeline.errors import UserError
from pipeline.stage import Instance
from pipeline.store import Store

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's 7 try a dead server for minutes
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

RUN_FILE = "mlflow.json"
NOTE = 8000  # characters of a tag
KEY = "firstlight.key"  # a tag


def tracking_uri(recipe: Recipe) -> str:
    return recipe.tracking.uri or f"sqlite:///{recipe.storage.resolve() / 'mlflow.db'}"


class Tracking:
    """The MLflow runs of one recipe.

    Raises:
        UserError: the tracking server or database cannot be reached; names `tracking.uri`.
    """

    def __init__(self, recipe: Recipe) -> None:
        import mlflow

        self.recipe, self.uri = recipe, tracking_uri(recipe)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if self.uri.startswith("file:") or "://" not in self.uri:
            raise UserError(
                f"tracking.uri: {self.uri!r} is not valid: MLflow keeps runs in a database or behind a server: sqlite:///... or http://..."
            )
        try:
            with _locked(recipe.storage.resolve()):  # two first users of one SQLite file would both create its tables, and one would crash
                mlflow.set_tracking_uri(self.uri)
                self.client = mlflow.MlflowClient(self.uri)
                self.experiment = self._experiment()
        except Exception as error:
            raise UserError(f"tracking.uri: {self.uri!r} cannot be used: {str(error).splitlines()[0][:200]}") from None

    def _experiment(self) -> str:
        name = self.recipe.tracking.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = self.uri.startswith("sqlite:")
        return str(self.client.create_experiment(name, str(self.recipe.storage.resolve() / "mlartifacts") if local else None))

    def start(self, name: str, file: Path, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """The id of the run that `file` remembers, running again; or of a new one, which `file` then remembers.

        A run has a key, which the file has before the run is there: a process that is killed in between leaves no run that nobody knows.
        """
        known = _remembered(file)
        run_id = known.get("run_id") or self._by_key(known.get("key"))
        if run_id is None or not self._revived(run_id, tags):
            known = {"key": uuid.uuid4().hex}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
            run_id = str(self.client.create_run(self.experiment, run_name=name, tags={**tags, KEY: known["key"]}).info.run_id)
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

    def start_stage(self, instance: Instance, parent: str, store: Store) -> str:
        """A child run of `parent`, with the stage's whole configuration and the store that it reads."""
        stage = self.recipe.stages[instance.stage]
        sections = {"stage": stage, "dataset": self.recipe.dataset, "encoder": self.recipe.encoder, "stream": self.recipe.stream}
        params = {"seed": instance.seed, "fingerprint": instance.fingerprint}
        params |= {f"{name}.{key}": v for name, section in sections.items() for key, v in _flat(section.model_dump(mode="json"))}
        tags = {"mlflow.parentRunId": parent, "firstlight.stage": instance.stage, "firstlight.kind": stage.kind}
        run_id = self.start(instance.label, instance.folder / RUN_FILE, params, tags)
        self._log_store(run_id, store, stage.kind)  # MLflow has it once, however often it is told
        return run_id

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for k in range(0, len(rows), 100):
            self.client.log_batch(run_id, params=rows[k : k + 100])

    def _log_store(self, run_id: str, store: Store, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(store.splits)
        dataset = Dataset(store.path.name, store.hash[:36], "local", json.dumps({"uri": str(store.path), "sha256": store.hash}), None, profile)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def metrics(self, run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Rows with `step`, `time` (s) and numbers by name."""
        from mlflow.entities import Metric

        skip = ("step", "time", "of")
        batch = [
            Metric(prefix + key, float(value), int(row["time"] * 1000), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if key not in skip
        ]
        for k in range(0, len(batch), 1000):
            self.client.log_batch(run_id, metrics=batch[k : k + 1000])

    def numbers(self, run_id: str, values: Mapping[str, float], prefix: str = "") -> None:
        """Results that have no step."""
        self.metrics(run_id, [{"step": 0, "time": time.time(), **values}], prefix)

    def last_step(self, run_id: str, key: str) -> int:
        """The last step logged under `key`, -1 for none: a resumed stage goes on behind it."""
        return max((m.step for m in self.client.get_metric_history(run_id, key)), default=-1)

    def log_encoder(self, run_id: str, folder: Path, instance: Instance, register_as: str | None) -> str:
        """The encoder as the artifact `encoder` and as a logged model; its `models:/...` reference. Said again, it is there once."""
        from mlflow.entities import LoggedModelOutput

        self.client.log_artifacts(run_id, str(folder), "encoder")
        tags = {"seed": str(instance.seed), "fingerprint": instance.fingerprint}
        made = self.client.search_logged_models([self.experiment], f"source_run_id = '{run_id}'", max_results=1)
        if made:
            model = made[0]
        else:
            model = self.client.create_logged_model(self.experiment, name="encoder", source_run_id=run_id, tags=tags, model_type="encoder")
        if str(model.status) != "READY":
            self.client.log_model_artifacts(model.model_id, str(folder))
            self.client.finalize_logged_model(model.model_id, "READY")
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        if register_as:
            self._register(register_as, model.model_id, run_id)
        return f"models:/{model.model_id}"

    def promote(self, run_id: str, name: str, alias: str) -> str:
        """Register the encoder that a pretraining's run has logged, if the alias is not its own already; its reference, `models:/name@alias`."""
        import mlflow

        try:
            holder = self.client.get_model_version_by_alias(name, alias).run_id
        except mlflow.MlflowException:  # there is no such model, or no such alias
            holder = None
        if holder != run_id:
            outputs = self.client.get_run(run_id).outputs
            assert outputs is not None
            (model,) = outputs.model_outputs
            self._register(name, model.model_id, run_id, alias)
        return f"models:/{name}@{alias}"

    def _register(self, name: str, model_id: str, run_id: str, alias: str = "current") -> None:
        import mlflow

        with contextlib.suppress(mlflow.MlflowException):  # it exists
            self.client.create_registered_model(name)
        made = self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'", max_results=1)
        version = made[0] if made else self.client.create_model_version(name, f"models:/{model_id}", run_id=run_id, model_id=model_id)
        self.client.set_registered_model_alias(name, alias, version.version)

    def log_card(self, run_id: str, file: Path, text: str, folder: str) -> None:
        """A model card as artifact, and as what MLflow shows on the run's page: up to the last section that a tag has room for."""
        self.client.log_artifact(run_id, str(file), folder)
        if len(text) > NOTE:
            end = text.rfind("\n#", 0, NOTE - 100)
            text = f"{text[:end]}\n\nThe rest is in the artifact {folder}/{file.name}.\n"
        self.client.set_tag(run_id, "mlflow.note.content", text)

    def log_consumed(self, run_id: str, reference: str) -> None:
        self.client.set_tag(run_id, "firstlight.encoder", reference)

    def pin(self, reference: str, where: str) -> str:
        """An alias moves: `models:/name@alias` -> `models:/name/version`; other references are as they are.

        Raises:
            UserError: there is no such model or alias.
        """
        import mlflow

        name, at, alias = reference.removeprefix("models:/").partition("@")
        if not reference.startswith("models:/") or not at:
            return reference
        try:
            return f"models:/{name}/{self.client.get_model_version_by_alias(name, alias).version}"
        except mlflow.MlflowException as error:
            raise UserError(f"{where}: {reference!r} is not in {self.uri}: {str(error).splitlines()[0][:200]}") from None

    def beside(self, reference: str, name: str, where: str) -> str:
        """The reference of a network that the run of an encoder has handed on beside it: `runs:/<run>/<name>`.

        Raises:
            UserError: the run has none of this name; names the run, and what it has.
        """
        import mlflow

        try:
            run_id = self._source_run(reference)
            has = sorted(entry.path for entry in self.client.list_artifacts(run_id) if entry.is_dir and entry.path != "figures")
        except mlflow.MlflowException as error:
            raise UserError(f"{where}: {reference!r} is not in {self.uri}: {str(error).splitlines()[0][:200]}") from None
        if name not in has:
            raise UserError(f"{where}: {name!r} is not valid: run {run_id}, which made {reference!r}, has {', '.join(has) or 'nothing'}")
        return f"runs:/{run_id}/{name}"

    def _source_run(self, reference: str) -> str:
        kind, _, path = reference.partition(":/")
        name, _, version = path.partition("/")
        if kind == "runs":
            return name
        return str(self.client.get_model_version(name, version).run_id if version else self.client.get_logged_model(name).source_run_id)

    def fetch(self, reference: str, target: Path, where: str) -> Path:
        """The folder behind `runs:/...` or `models:/...`, copied into `target`.

        Raises:
            UserError: nothing is there; names `where` and the reference.
        """
        import mlflow

        target.mkdir(parents=True, exist_ok=True)
        try:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=str(target), tracking_uri=self.uri))
        except Exception as error:
            raise UserError(f"{where}: {reference!r} is not in {self.uri}: {str(error).splitlines()[0][:200]}") from None

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        self.client.set_terminated(run_id, status)


def _remembered(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / ".mlflow.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
