"""Accuracies of features: over embedded images, and over the rows of a memory bank."""

import pytest
import torch
from torch import Tensor

from firstlight.pipeline.stages.features.feature_scores import ScoringOptions, score_bank, score_features
from tests.support import references

OPTIONS = ScoringOptions(knn_k=7, knn_temperature=0.5, probe_weight_decays=(1e-3,), classes=7)


def labelled(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of seven overlapping classes."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(7, (n,), generator=rng)
    centres = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 0.8 * torch.randn(n, 5, generator=rng), labels


def share_right(scored: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor], cosine: bool) -> float:
    (features, labels), (rows, known) = scored, gallery
    found = [
        references.weighted_knn(x, rows.double().tolist(), known.tolist(), 7, 0.5, cosine)
        for x in features.double().tolist()
    ]
    return sum(a == b for a, b in zip(found, labels.tolist(), strict=True)) / len(found)


def test_bank_is_scored_by_products_and_embedded_images_by_cosines() -> None:
    train, val, test = labelled(60, 1), labelled(40, 2), labelled(50, 3)
    embedded, bank = score_features([train, val, test], OPTIONS)["knn"], score_bank(train, [val, test], OPTIONS)
    for part, scored in (("val", val), ("test", test)):
        assert embedded[part] == pytest.approx(share_right(scored, train, cosine=True))
        assert bank[part] == pytest.approx(share_right(scored, train, cosine=False))
        assert 0.2 < bank[part] < bank[f"{part}_top5"] < 1.0
    assert embedded["test"] != bank["test"]


def test_without_test_images_only_held_out_ones_are_scored() -> None:
    train, val = labelled(60, 1), labelled(40, 2)
    assert score_bank(train, [val], OPTIONS).keys() == {"val", "val_top5"}
    found = score_features([train, val], OPTIONS)
    assert found["knn"].keys() == {"val", "val_top5"}
    assert sum(map(sum, found["confusion"])) == 40
