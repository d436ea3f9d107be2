"""The publisher of each kind of stage."""

from typing import Any

from firstlight.pipeline.report.publish.exports import EmbedPublisher, ExportPublisher
from firstlight.pipeline.report.publish.features import EvaluatePublisher, RetrievePublisher
from firstlight.pipeline.report.publish.finetune import FinetunePublisher
from firstlight.pipeline.report.publish.pretrain import PretrainPublisher
from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.report.publish.reconstruct import ReconstructPublisher

PUBLISHERS: dict[str, StagePublisher[Any]] = {
    "pretrain": PretrainPublisher(),
    "evaluate": EvaluatePublisher(),
    "finetune": FinetunePublisher(),
    "retrieve": RetrievePublisher(),
    "reconstruct": ReconstructPublisher(),
    "embed": EmbedPublisher(),
    "export": ExportPublisher(),
}
DEFAULT_PUBLISHER = StagePublisher[Any]()


def find_publisher(kind: str) -> StagePublisher[Any]:
    """Returns the publisher of a kind of stage, `DEFAULT_PUBLISHER` if the kind has none."""
    return PUBLISHERS.get(kind, DEFAULT_PUBLISHER)
