"""The page of a look: what it says of images without findings, and how many it shows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look import look_page
from firstlight.pipeline.look.findings import ImagePair, LookFindings
from firstlight.pipeline.look.image_lists import ImageLister
from firstlight.pipeline.look.look_page import LookFacts, describe_findings, render_look


@pytest.fixture
def facts(tmp_path: Path, digits: Store) -> LookFacts:
    ids = np.arange(30)
    features = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    nothing = LookFindings((), (), ((3, 0.25),), (4, 5), frozenset())
    return LookFacts(
        tmp_path,
        digits,
        ids,
        features,
        "pixels",
        0.97,
        nothing,
        ImageLister(digits, tmp_path, ids),
        *[tmp_path / "a.csv"] * 2,
    )


def test_page_reports_that_nothing_was_found(facts: LookFacts) -> None:
    assert describe_findings(facts)[2:4] == [
        "near duplicates: 0 pairs with a cosine of 0.97 or more, 0 of them between train and another split",
        f"to leave out: 0 images to train on: {facts.unique_file} lists the others",
    ]
    page = render_look(facts)
    assert "No two images have a cosine of 0.97 or more." in page
    assert "No image to train on is near one of another split." in page
    assert "0.25: image 3" in page


def test_page_cuts_many_findings_and_says_so(facts: LookFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_page, "MAX_SHOWN_PAIRS", 2)
    pairs = tuple(ImagePair(0, k, 1.0 - k / 100) for k in range(1, 5))
    page = render_look(replace(facts, findings=replace(facts.findings, near_duplicates=pairs, leaks=pairs[:1])))
    assert "The first 2 of 4 pairs, by their cosine." in page
    assert "1 pair, by their cosine." in page
    assert "A score on such images measures what was remembered." in page


def test_map_has_a_point_for_each_image_with_its_class(facts: LookFacts) -> None:
    page = render_look(facts)
    assert (page.count('<i tabindex="0"'), page.count('<i tabindex="-1"')) == (1, 29), "Tab reaches one of them"
    for label in facts.store.classes:
        assert f"</i>{label}</li>" in page
