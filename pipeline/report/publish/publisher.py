"""The contract of a publisher: it logs a finished stage."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.train.context import StageContext

PublishedSection = TypeVar("PublishedSection", bound=StageConfig)


class StagePublisher(Generic[PublishedSection]):
    """Publishes stages of one kind. Only it and `summaries.py` know the keys of a kind in MLflow.

    This class serves the kinds for which `registry.py` has no other: it logs the measures of a stage, and the encoder
    or model that the stage has left in the folder of that name.
    """

    # The folder of the model card that is written for an instance after all stages have finished; "" if there is none.
    card_folder: ClassVar[str] = ""

    def publish(
        self,
        tracking: TrackingClient,
        run_id: str,
        context: StageContext,
        stage: PublishedSection,
        instance: StageInstance,
    ) -> None:
        """Logs the results of a finished instance into its run. Runs on the driver; a second call changes nothing."""
        kind, numbers = stage_kind(stage), {}
        for measure in stage.measures:
            for arm in measure.arms:
                for split in ("val", "test"):
                    value = kind.read_score(stage, measure, arm, split, instance)
                    if value is not None:
                        numbers[f"{arm}/{measure.name}_{split}"] = value
        if stage.made_artifact:
            tracking.log_encoder(run_id, instance.folder / stage.made_artifact, instance, None, stage.made_artifact)
        tracking.log_results(run_id, numbers)
        tracking.client.log_dict(run_id, instance.result or {}, "result.json")

    def write_card(
        self,
        context: StageContext,
        instance: StageInstance,
        siblings: Sequence[StageInstance],
        rows: Sequence[ScoreRow],
        lineage: Mapping[str, str],
    ) -> str | None:
        """Writes the model card into `card_folder`. Returns its text, None if the file has this text already.

        `siblings`: the instances of which the table `rows` of the recipe tells the scores. `lineage`: MLflow runs and
        references, by role.
        """
        return None
