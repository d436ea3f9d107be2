"""Every kind of stage has a publisher."""

from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.report.publish.registry import PUBLISHERS, find_publisher
from firstlight.pipeline.stages.registry import STAGES


def test_kind_without_its_own_publisher_gets_the_general_one() -> None:
    assert type(find_publisher("toy")) is StagePublisher


def test_every_publisher_is_of_a_registered_kind_and_exports_and_fine_tunings_have_model_cards() -> None:
    assert set(PUBLISHERS) <= set(STAGES)
    assert {kind for kind in PUBLISHERS if find_publisher(kind).card_folder} == {"export", "finetune"}
