"""Publisher of fine-tunings."""

from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.data.labelled import write_labelled
from firstlight.pipeline.report import curves, image_figures
from firstlight.pipeline.report.cards.fine_tuned_card import write_model_card
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.report.publish.filters import add_filters
from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.stages.finetuning.candidates import list_candidates
from firstlight.pipeline.stages.finetuning.job import finetune_ids
from firstlight.pipeline.stages.pictures import read_tensors
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FOLDER
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.metric_keys import unique_key_parts
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import DROPPED_IDS_FILE, METRICS_FILE, read_metrics


class FinetunePublisher(StagePublisher[Finetune]):
    """Publishes the scores, learning curves and predictions of every arm, and the images that were learned from; and
    the model of the first arm, with its card.
    """

    card_folder = MODEL_FOLDER

    def publish(
        self, tracking: TrackingClient, run_id: str, context: StageContext, stage: Finetune, instance: StageInstance
    ) -> None:
        result = instance.result
        assert result is not None
        figure_log = FigureLog(tracking, run_id, instance.folder)
        split = "test" if context.recipe.score_test else "held-out"
        for arm in stage.compared_arms:
            facts = {key: value for key, value in result[arm].items() if key != "scores" and value is not None}
            tracking.log_results(run_id, facts, f"{arm}/")
            for part, scores in result[arm]["scores"].items():
                tracking.log_results(run_id, _flatten_scores(scores, context.store.classes), f"{arm}/{part}_")
            rows = read_metrics(instance.folder / f"{arm}-lr{result[arm]['lr']:g}" / METRICS_FILE)
            figure_log.add(
                f"curves_{arm}", curves.plot_loss(rows), f"loss, {arm}, with the learning rate that was chosen"
            )
            pictures = instance.folder / f"{arm}.safetensors"
            if pictures.exists():
                caption = f"{split} images, {arm}"
                figure = image_figures.draw_image_rows(read_tensors(pictures), caption)
                figure_log.add(f"predicted_{arm}", figure, caption)
        if len(stage.compared_arms) > 1:
            caption = "training losses of all arms, in a panel for each learning rate"
            figure_log.add("curves_arms", curves.plot_arm_losses(_read_trainings(stage, instance)), caption)
        add_filters(figure_log, context.recipe, instance)
        # One model of a stage is registered: that of the first seed.
        name = stage.register_as if instance.seed == context.recipe.seeds[0] else None
        tracking.log_encoder(run_id, instance.folder / MODEL_FOLDER, instance, name, MODEL_FOLDER)
        labelled = write_labelled(context.store, finetune_ids(context, stage, instance), instance.folder)
        tracking.client.log_artifact(run_id, str(labelled))
        # All candidates have one plan, so the first one's file is that of all.
        dropped = instance.folder / next(iter(list_candidates(stage))) / DROPPED_IDS_FILE
        if dropped.exists():
            tracking.client.log_artifact(run_id, str(dropped))
        tracking.client.log_dict(run_id, result, "finetune.json")

    def write_card(
        self,
        context: StageContext,
        instance: StageInstance,
        siblings: Sequence[StageInstance],
        rows: Sequence[ScoreRow],
        lineage: Mapping[str, str],
    ) -> str | None:
        return write_model_card(context, instance, siblings, rows, lineage)


def _read_trainings(stage: Finetune, instance: StageInstance) -> dict[str, dict[str, curves.MetricRows]]:
    """Returns the logged rows of all trainings of an instance: by learning rate, then by arm."""
    found: dict[str, dict[str, curves.MetricRows]] = {}
    for name, (arm, rate) in list_candidates(stage).items():
        found.setdefault(f"learning rate {rate:g}", {})[arm] = read_metrics(instance.folder / name / METRICS_FILE)
    return found


def _flatten_scores(scores: dict[str, Any], classes: tuple[str, ...]) -> dict[str, float]:
    """Returns the scores that exist by key, with a key for each class that has a value instead of a list of them."""
    single = {name: value for name, value in scores.items() if not isinstance(value, list) and value is not None}
    lists = {name: value for name, value in scores.items() if isinstance(value, list)}
    keys = unique_key_parts(classes)
    by_class = {
        f"{name}/{key}": value
        for name, values in lists.items()
        for key, value in zip(keys, values, strict=True)
        if value is not None
    }
    return single | by_class
