"""Publishes what leaves Firstlight: embeddings, and encoders in the formats of other libraries."""

from pathlib import Path

import numpy as np

from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.report import figures
from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.stages.embed import EMBEDDINGS_FOLDER as EMBEDDINGS
from firstlight.pipeline.stages.embed import Embed, open_embeddings, read_embeddings_manifest
from firstlight.pipeline.stages.export import EXPORT_FOLDER as EXPORT
from firstlight.pipeline.stages.export import Export
from firstlight.pipeline.stages.projection import PlaneMap, project_to_plane
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.train.context import StageContext

SMALL = 100_000_000  # bytes: embeddings up to these go into MLflow, of others only the manifest
SHOWN = 3000  # points of the map


class EmbedPublisher(StagePublisher[Embed]):
    """Publishes the manifest, a map of the embeddings, and the embeddings themselves where they are small."""

    def publish(self, tracking: Tracking, run_id: str, worker: StageContext, stage: Embed, instance: StageInstance) -> None:
        """The manifest, a map of the embeddings, and the embeddings themselves where they are small, into the MLflow run."""
        folder = instance.folder / EMBEDDINGS
        manifest, entries = read_embeddings_manifest(folder)
        total = sum(entry.bytes for entry in entries)
        tracking.numbers(
            run_id, {"images": sum(entry.count for entry in entries), "size": manifest["size"], "bytes": total}
        )
        tracking.client.log_artifact(run_id, str(folder / MANIFEST_FILE), EMBEDDINGS)
        if total <= SMALL:
            for entry in entries:
                tracking.client.log_artifact(run_id, str(folder / entry.file), EMBEDDINGS)
        split = next((name for name in ("val", "test", "train") if manifest["counts"].get(name)), None)
        if split:
            mapped, labels, told = _map(worker, stage, folder, split)
            Album(tracking, run_id, instance.folder).add(
                "map", figures.draw_embedding_map(mapped, labels, worker.store.classes), told
            )


class ExportPublisher(StagePublisher[Export]):
    """Publishes the exported files and how far they are from the encoder."""

    def publish(self, tracking: Tracking, run_id: str, worker: StageContext, stage: Export, instance: StageInstance) -> None:
        """The exported files and how far they are from the encoder, into the MLflow run."""
        result = instance.result
        assert result is not None
        for format, facts in result["formats"].items():
            worst = max(found["relative"] for found in facts["difference"].values())
            tracking.numbers(
                run_id,
                {"relative_difference": worst, "bytes": sum(file["bytes"] for file in facts["files"].values())},
                f"{format}/",
            )
        tracking.client.log_artifacts(run_id, str(instance.folder / EXPORT), EXPORT)
        tracking.client.log_dict(run_id, result, "export.json")


def _map(worker: StageContext, stage: Embed, folder: Path, split: str) -> tuple[dict[str, PlaneMap], np.ndarray, str]:
    """Some embeddings of a split on a plane, by title, their labels, and a line that tells of them; of `map_classes` alone where they are given."""
    ids, embeddings = open_embeddings(folder, split)
    labels, classes = worker.splits.labels[ids], worker.store.classes
    shown = (
        np.flatnonzero(np.isin(labels, [classes.index(name) for name in stage.map_classes]))
        if stage.map_classes
        else np.arange(len(ids))
    )
    chosen = select_evenly_spaced(shown, SHOWN)
    title = f"embeddings: {len(chosen):,} of {len(ids):,} {split} images"
    how = "at their first two principal components" if stage.map == "pca" else "by t-SNE"
    return {title: project_to_plane(embeddings[chosen], stage.map)}, labels[chosen], f"{title}, {how}"
