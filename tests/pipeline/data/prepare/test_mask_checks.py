"""Void that may hide a class is asked about before anything is learned."""

from types import SimpleNamespace
from typing import cast

import pytest

from firstlight.pipeline.data.prepare.mask_checks import check_masks
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError


def make_store(classes: tuple[str, ...], **pixels: int) -> Store:
    counts = {name.removeprefix("v"): count for name, count in pixels.items()}
    return cast(Store, SimpleNamespace(classes=classes, images={"annotated": {"train": {"pixels": counts}}}))


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (
            make_store(("background", "cell"), v0=90, v255=10),
            "10.0% of the pixels of the training masks are 255, which is void, and class 1 ('cell') never occurs; "
            "valid, if 255 is a class: {background: 0, cell: 255}, and if it is void: "
            "{background: 0, cell: 1, void: 255}",
        ),
        (make_store(("a", "b", "c"), v0=50, v2=30, v255=20), "{a: 0, c: 2, b: 255}"),
        (make_store(("cell",), v0=50, v255=50), "'cell' is the only class"),
        (make_store(("background", "crack"), v0=997, v255=3), "0.3% of the pixels"),
        (make_store(("a", "b"), v255=50), "100.0% of the pixels"),
    ],
)
def test_void_beside_a_class_that_never_occurs_is_asked_about(store: Store, said: str) -> None:
    with pytest.raises(UserError) as raised:
        check_masks(store, {})
    assert str(raised.value).startswith("dataset.mask_values: ")
    assert said in str(raised.value)
    check_masks(store, {"a": (0,), "void": (255,)})


@pytest.mark.parametrize(
    ("store", "refused"),
    [
        (
            make_store(("background", "cell"), v0=50, v1=10, v255=40),
            make_store(("background", "cell"), v0=60, v255=40),
        ),
        (
            make_store(("background", "cell", "other"), v0=90, v1=5, v255=5),
            make_store(("background", "cell", "other"), v0=85, v1=5, v255=10),
        ),
        (make_store(("background", "cell"), v0=100), make_store(("background", "cell"), v0=99, v255=1)),
        (
            cast(Store, SimpleNamespace(classes=("a",), images={})),
            make_store(("a",), v0=3, v255=1),
        ),
        (
            cast(Store, SimpleNamespace(classes=("a",), images={"annotated": {"train": {"boxes": {"0": 3}}}})),
            make_store(("a",), v0=3, v255=3),
        ),
    ],
)
def test_other_masks_pass(store: Store, refused: Store) -> None:
    """Each is compared with a refused one that differs in one thing."""
    check_masks(store, {})
    with pytest.raises(UserError):
        check_masks(refused, {})
