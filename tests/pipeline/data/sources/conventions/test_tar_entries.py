"""Entries of archives: images with their labels, in order, and members that are refused at the end."""

from collections import Counter
from typing import Any

from firstlight.pipeline.data.sources.conventions.tar_entries import pack_listing, resolve_samples
from firstlight.pipeline.data.sources.tar_index import ArchiveListing, TarMember
from tests.support.image_sources import dataset_options


def resolve(
    *archives: list[TarMember], **options: Any
) -> tuple[list[tuple[str, str | None]], dict[int, str], list[int]]:
    listings = [pack_listing(ArchiveListing(list(members))) for members in archives]
    found = resolve_samples(listings, dataset_options(source="webdataset", root="x", **options))
    names = [name.decode() for name in found.entries.names.to_pylist()]
    return list(zip(names, found.entries.labels.to_pylist(), strict=True)), found.entries.reasons, found.ends.tolist()


def image(name: str, offset: int = 0) -> TarMember:
    return TarMember("image", name, offset, 1)


def label(name: str, text: str | None, reason: str | None = None) -> TarMember:
    return TarMember("label", name, label=text, reason=reason)


def test_refused_members_follow_and_archives_lie_end_to_end() -> None:
    first = [image("a.jpg"), TarMember("refused", "x.jpg", reason="is odd"), label("a.cls", "1"), image("b.jpg")]
    entries, reasons, ends = resolve(first, [label("c.cls", "2"), image("c.jpg")])
    assert entries == [("a.jpg", "1"), ("b.jpg", None), ("x.jpg", None), ("c.jpg", "2")]
    assert (reasons, ends) == ({2: "is odd"}, [3, 4])


def test_label_fields_have_an_order() -> None:
    members = [image("a.jpg"), label("a.json", "j"), label("a.cls", "c"), label("a.label", "l"), label("a.y.cls", "y")]
    assert resolve(members)[0] == [("a.jpg", "l")]
    assert resolve([image("a.jpg"), label("a.x.cls", "x"), label("a.json", "j")])[0] == [("a.jpg", "j")]
    assert resolve([image("a.jpg"), label("a.cls", None), label("a.json", "j")])[0] == [("a.jpg", "j")]


def test_problems_of_labels_are_reasons() -> None:
    members = [
        image("a.jpg"),
        label("a.cls", None, "is torn"),
        image("b.jpg"),
        label("b.cls", "1"),
        label("b.cls", "2"),
    ]
    entries, reasons, _ = resolve([*members, label("c.cls", "3")])
    assert [name for name, _ in entries] == ["a.jpg", "b.jpg", "c.cls"]
    assert reasons == {0: "is torn", 1: "the sample has two labels", 2: "the sample has no image"}


def test_json_files_without_the_field_are_reported() -> None:
    listing = ArchiveListing([image("a.jpg"), label("a.json", None)], json_fields=Counter({"kind": 1, "id": 1}))
    found = resolve_samples([pack_listing(listing)], dataset_options(source="webdataset", root="x"))
    assert found.notes == ("no .json file has the field 'label' (dataset.label_column); fields: id 1, kind 1",)
