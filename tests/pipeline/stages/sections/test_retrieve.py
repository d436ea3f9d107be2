"""The section of retrievals."""

import pytest

from firstlight.pipeline.stages.sections.retrieve import Retrieve


def test_measures_are_precisions_of_the_chosen_layer() -> None:
    stage = Retrieve(kind="retrieve", layer=1, precision_at=(1, 5))
    assert stage.feature_layers == (1,)
    assert [(m.name, m.label) for m in stage.measures] == [
        ("precision@1", "precision@1 (layer 1)"),
        ("precision@5", "precision@5 (layer 1)"),
    ]


@pytest.mark.parametrize(
    ("queries", "gallery", "splits"),
    [("val", "train", {"val"}), ("val", "all", {"val", "test"}), ("test", "train", {"test"})],
)
def test_queries_and_gallery_say_which_splits_are_measured(queries: str, gallery: str, splits: set[str]) -> None:
    stage = Retrieve.model_validate({"kind": "retrieve", "queries": queries, "gallery": gallery})
    assert stage.measured_splits == splits
