"""Runs in MLflow: a parent run for each recipe, and a child run for each stage and seed.

The loggers of `tracking.loggers` get the same.

Only the driver writes to MLflow. Workers write their numbers to files.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.connection import open_experiment
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.loggers.contract import LoggedRun
from firstlight.pipeline.tracking.metric_keys import remove_refused_characters
from firstlight.pipeline.tracking.metric_log import MetricLog
from firstlight.pipeline.tracking.models import describe_versions, register_model
from firstlight.pipeline.tracking.run_file import RUN_FILE, read_run_file

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Recipe

# Tags of a stage's run: the reference of the encoder that it started from, and the run that made it.
ENCODER_TAG, ENCODER_RUN_TAG = "firstlight.encoder", "firstlight.encoder_run"
WEIGHTS_TAG = "firstlight.weights"
# The network that the stage makes: `encoder`, or a `model` that contains one.
MADE_TAG = "firstlight.makes"
TEACHER_TAG = "firstlight.teacher"
# The prefix of a tag of a recipe's run; the name of a stage follows, and the value is the ids of the stage's runs by
# seed.
STAGE_RUNS_PREFIX = "firstlight.runs."
RUN_KEY_TAG = "firstlight.key"
# MLflow shows it at the top of a run's page, as Markdown.
DESCRIPTION_TAG = "mlflow.note.content"
# The folder of a run's figures, in MLflow and on disk
FIGURES_FOLDER = "figures"
MAX_NOTE_LENGTH = 8000
# The most characters of the description of a registered version.
MAX_DESCRIPTION_LENGTH = 5000
MAX_PARAM_LENGTH = 6000
# The most parameters in one request to MLflow.
MAX_PARAMS = 100


class TrackingClient(MetricLog):
    """Writes the MLflow runs of one recipe.

    Raises:
        UserError: the tracking server or database cannot be used; names `tracking.uri`.
    """

    def __init__(
        self, recipe: "Recipe", location: TrackingLocation | None = None, console: Console | None = None
    ) -> None:
        """Connects to `location`; the default is where the recipe says. `console`: for notes about loggers.

        The loggers are those that `check_loggers` has found usable.
        """
        self.recipe, self.location = recipe, location or TrackingLocation.of(recipe)
        self.uri = self.location.uri
        direct_client, self.experiment_id = open_experiment(self.location)
        super().__init__(direct_client, recipe.tracking.loggers, console)

    def start_run(
        self,
        name: str,
        file: Path,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        began: float | None = None,
    ) -> str:
        """Returns the id of the run that is noted in `file`, which is reopened, or of a new run, which is noted there.

        Each run has a key, which is noted before the run is created: if the process is killed in between, the next one
        finds the run by its key. `began`: when the work of a new run began, in seconds since 1970; None is now.
        """
        known = read_run_file(file)
        run_id = known.get("run_id") or self._find_by_key(known.get("key"))
        if run_id is None or not self._reopen_run(run_id, tags):
            known = {"key": uuid.uuid4().hex}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_sealed_json(file, known)
            run_id = str(
                self.client.create_run(
                    self.experiment_id,
                    start_time=None if began is None else int(1000 * began),
                    run_name=name,
                    tags={**tags, RUN_KEY_TAG: known["key"]},
                ).info.run_id
            )
        if "run_id" not in known:
            self._log_params(run_id, params)
            write_sealed_json(file, {**known, "run_id": run_id, "tracking_uri": self.uri})
        self.loggers.start_run(self._describe_run(run_id, name, params, tags))
        return run_id

    def _describe_run(self, run_id: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> LoggedRun:
        return LoggedRun(
            run_id,
            name,
            self.recipe.name,
            self.location.experiment,
            self.location.storage,
            tags.get("firstlight.kind", "recipe"),
            tags.get("mlflow.parentRunId"),
            tags.get(DESCRIPTION_TAG, ""),
            {key: str(value) for key, value in params.items()},
            {key: str(value) for key, value in tags.items() if not key.startswith("mlflow.")},
        )

    def _find_by_key(self, key: str | None) -> str | None:
        found = (
            self.client.search_runs([self.experiment_id], f"tags.{RUN_KEY_TAG} = '{key}'", max_results=1) if key else []
        )
        return str(found[0].info.run_id) if found else None

    def _reopen_run(self, run_id: str, tags: Mapping[str, str]) -> bool:
        import mlflow

        try:
            self.client.update_run(run_id, status="RUNNING")
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)
        except mlflow.MlflowException:
            # The run was deleted, or belongs to another tracking store.
            return False
        return True

    def start_stage_run(self, instance: StageInstance, parent: str, store: Store, began: float | None = None) -> str:
        """Starts a child run of `parent`, with the stage's configuration and its store. Returns the run's id.

        `began`: when the work of the instance began, in seconds since 1970; None is now.
        """
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
            for key, v in _flatten_params(section.model_dump(mode="json"))
        }
        tags = {"mlflow.parentRunId": parent, "firstlight.stage": instance.stage, "firstlight.kind": stage.kind}
        tags |= {MADE_TAG: stage.made_artifact} if stage.made_artifact else {}
        run_id = self.start_run(instance.label, instance.folder / RUN_FILE, params, tags, began)
        # MLflow keeps one entry, however often the store is logged.
        self.log_store(run_id, store, stage.kind)
        return run_id

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs the parameters that the run does not have.

        A process that was killed may have logged some, and MLflow refuses to change their values.
        """
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        rows = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in params.items() if key not in known]
        for k in range(0, len(rows), MAX_PARAMS):
            self.client.log_batch(run_id, params=rows[k : k + MAX_PARAMS])

    def log_store(self, run_id: str, store: Store, context: str) -> None:
        """Logs a store as the data set of a run; `context` says what for. A repetition adds nothing."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(store.splits)
        dataset = Dataset(
            store.path.name,
            store.hash[:36],
            "local",
            json.dumps({"uri": store.location, "sha256": store.hash}),
            None,
            profile,
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_encoder(
        self, run_id: str, folder: Path, instance: StageInstance, register_as: str | None, name: str = "encoder"
    ) -> str:
        """Logs an encoder as the artifact `encoder` and as the logged model of the run, and registers it under a name.

        `name`: what MLflow calls it: `model` for a fine-tuned model, which contains an encoder. Returns its reference,
        `models:/<id>`.
        """
        from mlflow.entities import LoggedModelOutput

        self.client.log_artifacts(run_id, str(folder), name)
        model_id = self.find_model(run_id)
        if model_id is None:
            tags = {"seed": str(instance.seed), "fingerprint": instance.fingerprint}
            # A process that was killed may have left an unfinished one.
            condition = f"source_run_id = '{run_id}'"
            unfinished = self.client.search_logged_models([self.experiment_id], condition, max_results=1)
            model = unfinished[0] if unfinished else self._create_model(run_id, name, tags)
            model_id = str(model.model_id)
            self.client.log_model_artifacts(model_id, str(folder))
            self.client.finalize_logged_model(model_id, "READY")
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
        if register_as:
            register_model(self.client, register_as, model_id, run_id)
        return f"models:/{model_id}"

    def _create_model(self, run_id: str, name: str, tags: dict[str, str]) -> Any:
        return self.client.create_logged_model(
            self.experiment_id, name=name, source_run_id=run_id, tags=tags, model_type=name
        )

    def promote_encoder(self, run_id: str, name: str, alias: str) -> str:
        """Registers the encoder that a pretraining's run logged. Returns its reference, `models:/<name>@<alias>`."""
        model_id = self.find_model(run_id)
        assert model_id is not None
        register_model(self.client, name, model_id, run_id, alias)
        return f"models:/{name}@{alias}"

    def log_figure(self, run_id: str, file: Path, title: str) -> None:
        """Logs a PNG file as a figure of a run."""
        self.client.log_artifact(run_id, str(file), FIGURES_FOLDER)
        self.loggers.log_image(run_id, f"{FIGURES_FOLDER}/{file.stem}", file, title)

    def find_model(self, run_id: str) -> str | None:
        """Returns the id of the logged model that is the output of a run, None if it has none."""
        outputs = self.client.get_run(run_id).outputs
        return next((model.model_id for model in (outputs.model_outputs if outputs else None) or ()), None)

    def log_stage_runs(self, run_id: str, stage: str, runs: Sequence[str]) -> None:
        """Notes in a recipe's run the runs of a stage, which an earlier run of the recipe may have made.

        The lineage and the repetition of the recipe's run read them.
        """
        key = STAGE_RUNS_PREFIX + remove_refused_characters(stage)
        self.client.set_tag(run_id, key, " ".join(runs))

    def log_model_card(self, run_id: str, file: Path, text: str, folder: str) -> None:
        """Logs a model card as an artifact and as the run's description, up to the last section that fits a tag.

        The logged model of the run has the card too, and so have the descriptions of its registered versions.
        """
        self.client.log_artifact(run_id, str(file), folder)
        rest = f"The rest is in the artifact {folder}/{file.name}."
        self.client.set_tag(run_id, DESCRIPTION_TAG, _cut_sections(text, MAX_NOTE_LENGTH, rest))
        model_id = self.find_model(run_id)
        if model_id is not None:
            self.client.log_model_artifact(model_id, str(file))
            describe_versions(self.client, run_id, _cut_sections(text, MAX_DESCRIPTION_LENGTH, rest))

    def log_weights(self, run_id: str, reference: str, facts: Mapping[str, str], tag: str = WEIGHTS_TAG) -> None:
        """Logs the existing weights that a run uses: where they are from, and what is known of them, as tags."""
        self.client.set_tag(run_id, tag, reference)
        for key, value in facts.items():
            self.client.set_tag(run_id, f"{tag}.{key}", value)

    def log_encoder_source(self, run_id: str, reference: str, made_by: str) -> None:
        """Logs the encoder that a run starts from: its pinned reference, its run, and its model as an input."""
        import mlflow
        from mlflow.entities import LoggedModelInput

        self.client.set_tag(run_id, ENCODER_TAG, reference)
        self.client.set_tag(run_id, ENCODER_RUN_TAG, made_by)
        # The run may be deleted, or in another tracking store.
        with contextlib.suppress(mlflow.MlflowException):
            model_id = self.find_model(made_by)
            if model_id is not None:
                self.client.log_inputs(run_id, models=[LoggedModelInput(model_id)])

    def finish_run(self, run_id: str, status: str = "FINISHED", ended: float | None = None) -> None:
        """Ends a run. `ended`: when its work ended, in seconds since 1970; None is now."""
        self.client.set_terminated(run_id, status, None if ended is None else int(1000 * ended))
        self.loggers.finish_run(run_id, status)


def _cut_sections(text: str, limit: int, rest: str) -> str:
    """Returns a Markdown text up to the last section that fits `limit` characters; if it is cut, `rest` follows."""
    if len(text) <= limit:
        return text
    end = text.rfind("\n#", 0, limit - 100)
    return f"{text[:end]}\n\n{rest}\n"


def _flatten_params(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten_params(item, f"{path}.{key}" if path else key)
    else:
        yield path, value
