"""Publishers of embeddings, and of encoders and models in the formats of other libraries."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.report import figures
from firstlight.pipeline.report.cards.fine_tuned_card import write_exported_card
from firstlight.pipeline.report.cards.model_card import write_card
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.stages.embed import EMBEDDINGS_FOLDER, open_embeddings, read_embeddings_manifest
from firstlight.pipeline.stages.export import EXPORT_FOLDER
from firstlight.pipeline.stages.features.projection import PlaneMap, project_to_plane
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.sections.embed import Embed
from firstlight.pipeline.stages.sections.export import Export
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.train.context import StageContext

# Embeddings of more bytes are not copied into MLflow, only their manifest is.
MAX_LOGGED_EMBEDDING_BYTES = 100_000_000
# The images on the map of the embeddings.
NUM_MAP_POINTS = 3000


class EmbedPublisher(StagePublisher[Embed]):
    """Publishes the manifest and a map of the embeddings, and the embeddings if they are small."""

    def publish(
        self, tracking: TrackingClient, run_id: str, context: StageContext, stage: Embed, instance: StageInstance
    ) -> None:
        folder = instance.folder / EMBEDDINGS_FOLDER
        manifest, entries = read_embeddings_manifest(folder)
        total = sum(entry.bytes for entry in entries)
        tracking.log_results(
            run_id, {"images": sum(entry.count for entry in entries), "size": manifest["size"], "bytes": total}
        )
        tracking.client.log_artifact(run_id, str(folder / MANIFEST_FILE), EMBEDDINGS_FOLDER)
        if total <= MAX_LOGGED_EMBEDDING_BYTES:
            for entry in entries:
                tracking.client.log_artifact(run_id, str(folder / entry.file), EMBEDDINGS_FOLDER)
        split = next((name for name in ("val", "test", "train") if manifest["counts"].get(name)), None)
        if split:
            maps, labels, caption = _project_embeddings(context, stage, folder, split)
            figure = figures.draw_embedding_map(maps, labels, context.store.classes)
            FigureLog(tracking, run_id, instance.folder).add("map", figure, caption)


class ExportPublisher(StagePublisher[Export]):
    """Publishes the exported files, their sizes and their differences from the network."""

    card_folder = EXPORT_FOLDER

    def write_card(
        self,
        context: StageContext,
        instance: StageInstance,
        siblings: Sequence[StageInstance],
        rows: Sequence[ScoreRow],
        lineage: Mapping[str, str],
    ) -> str | None:
        write = write_card
        if (instance.result or {}).get("what") == "model":
            write = write_exported_card
        return write(context, instance, siblings, rows, lineage)

    def publish(
        self, tracking: TrackingClient, run_id: str, context: StageContext, stage: Export, instance: StageInstance
    ) -> None:
        result = instance.result
        assert result is not None
        for format, facts in result["formats"].items():
            worst = max(difference["relative"] for difference in facts["difference"].values())
            total = sum(file["bytes"] for file in facts["files"].values())
            tracking.log_results(run_id, {"relative_difference": worst, "bytes": total}, f"{format}/")
        tracking.client.log_artifacts(run_id, str(instance.folder / EXPORT_FOLDER), EXPORT_FOLDER)
        tracking.client.log_dict(run_id, result, "export.json")


def _project_embeddings(
    context: StageContext, stage: Embed, folder: Path, split: str
) -> tuple[dict[str, PlaneMap], np.ndarray, str]:
    """Returns embeddings of a split on a plane, by title, with their labels and a caption.

    The map has NUM_MAP_POINTS images, drawn from all, or from those of the classes `map_classes`.
    """
    ids, embeddings = open_embeddings(folder, split)
    labels, classes = context.splits.labels[ids], context.store.classes
    candidates = np.arange(len(ids))
    if stage.map_classes:
        candidates = np.flatnonzero(np.isin(labels, [classes.index(name) for name in stage.map_classes]))
    chosen = select_evenly_spaced(candidates, NUM_MAP_POINTS)
    title = f"embeddings: {len(chosen):,} of {len(ids):,} {split} images"
    how = "at their first two principal components" if stage.map == "pca" else "by t-SNE"
    return {title: project_to_plane(embeddings[chosen], stage.map)}, labels[chosen], f"{title}, {how}"
