"""Members of archives become samples, and one of several images is the image of a sample."""

import pytest

from firstlight.pipeline.data.sources.conventions.tar_samples import (
    SECOND_IMAGE_REASON,
    ImageField,
    TarSample,
    choose_image_field,
    choose_images,
    group_samples,
    has_dotted_keys,
    split_member_name,
)
from firstlight.pipeline.errors import UserError


def sample(*fields: str) -> TarSample:
    return TarSample({name: [k] for k, name in enumerate(fields)})


@pytest.mark.parametrize(
    ("name", "key", "field"),
    [
        ("a/b/0001.jpg", "a/b/0001", "jpg"),
        ("v1.0/0001.Depth.PNG", "v1.0/0001", "depth.png"),
        ("0001.image.jpg", "0001", "image.jpg"),
        ("../up.jpg", "../up", "jpg"),
    ],
)
def test_key_ends_at_first_dot_of_the_file(name: str, key: str, field: str) -> None:
    assert split_member_name(name) == (key, field)


def test_dotted_keys_are_noticed() -> None:
    numbered = [f"img.{k:04d}.jpg" for k in range(10)]
    assert has_dotted_keys(numbered, [])
    assert has_dotted_keys(numbered, [f"img.{k:04d}.cls" for k in range(10)])
    assert not has_dotted_keys([f"{k}.jpg" for k in range(10)], [])
    views = [f"{k}.view{v}.png" for k in range(10) for v in range(3)]
    assert not has_dotted_keys(views, [f"{k}.cls" for k in range(10)])
    assert not has_dotted_keys(["c.left.png", "c.middle.png", "c.right.png"], ["c.cls"])


def test_members_are_grouped_in_order() -> None:
    found = group_samples([(0, "b.jpg"), (2, "a.jpg"), (3, "b.x.png")], [(1, "b.cls"), (4, "c.cls")], False)
    assert list(found) == ["b", "a", "c"]
    assert found["b"] == TarSample({"jpg": [0], "x.png": [3]}, {"cls": [1]})
    assert group_samples([(0, "i.0.jpg"), (1, "i.1.jpg")], [], True).keys() == {"i.0", "i.1"}


@pytest.mark.parametrize(
    ("samples", "field", "beside"),
    [
        ([sample("jpg"), sample("png")], None, ()),
        ([sample("depth.png", "jpg")] * 3, "jpg", ("depth.png",)),
        ([sample("depth.png", "image.jpg")] * 3, "image.jpg", ("depth.png",)),
        ([sample("jpg", "seg.png")] * 2 + [sample("seg.png")] * 2, "jpg", ("seg.png",)),
        ([sample("left.png")] + [sample("left.png", "right.png")] * 2, "left.png", ("right.png",)),
    ],
)
def test_commonest_plain_field_is_the_image(
    samples: list[TarSample], field: str | None, beside: tuple[str, ...]
) -> None:
    found = choose_image_field(samples, "image")
    assert (found.name, found.beside) == (field, frozenset(beside))
    assert bool(found.note) == bool(beside)


def test_named_field_is_the_image() -> None:
    pairs = [sample("jpg", "depth.png")] * 2
    assert choose_image_field(pairs, "depth.png").name == "depth.png"
    assert choose_image_field([sample("image", "thumb.jpg")], "image").name == "image"
    with pytest.raises(
        UserError, match=r"dataset\.image_column: 'webp' is no field of a sample; fields with images: depth"
    ):
        choose_image_field(pairs, "webp")


def test_equal_fields_are_asked_for() -> None:
    with pytest.raises(
        UserError, match=r"samples have several images: jpg 2, png 2; valid: dataset\.image_column=jpg takes"
    ):
        choose_image_field([sample("jpg", "png")] * 2, "image")


def test_images_of_a_sample() -> None:
    chosen = ImageField("jpg", frozenset(["depth.png"]))
    assert list(choose_images(sample("depth.png", "jpg"), chosen)) == [(1, None)]
    assert list(choose_images(sample("depth.png"), chosen)) == [(0, "the sample has no jpg")]
    assert list(choose_images(sample("webp"), chosen)) == [(0, None)]
    assert list(choose_images(TarSample({"jpg": [3, 5]}), chosen)) == [(3, None), (5, SECOND_IMAGE_REASON)]
    assert list(choose_images(TarSample(), chosen)) == []
