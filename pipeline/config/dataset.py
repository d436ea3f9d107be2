"""The section `dataset` of a recipe: the location of the images, their splits and their pixels."""

import os
from typing import Literal

from pydantic import Field, field_validator, model_validator

from firstlight.pipeline.config.schema import Augment, SourceName, StrictModel, check_augment


class DatasetOptions(StrictModel):
    """The images: their location, their splits, and how each becomes `image_size` x `image_size` pixels."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="The name of the data set, also the beginning of its store's folder name. "
        "A name of conf/dataset starts from that file.",
    )
    source: SourceName = Field(description="The layout of the images, one of the [sources](#sources).")
    root: str | None = Field(
        None,
        min_length=1,
        description="The folder of the images: a path or a URI (s3://, gs://, http://, https://, file://). "
        "`digits` needs none.",
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
        description="Source `parquet`: the column of the encoded images, as bytes or as a struct with a field `bytes`.",
    )
    path_column: str = Field("path", description="Source `list`: the column of the images' paths.")
    label_column: str | None = Field(
        "label",
        description="The column of the labels (sources `parquet`, `list` and `cifar100`), or the field of the .json "
        "files (`webdataset`). null: the images have no labels.",
    )
    split_column: str | None = Field(
        None,
        description="Source `list`: the column that holds train, test, val or validation. "
        "null: all rows belong to the training split.",
    )
    annotations: tuple[Literal["boxes", "mask", "present"], ...] | None = Field(
        None,
        description="Source `voc`: the annotations that are read: boxes, present (the classes that occur), both, or "
        "mask alone. []: none. null: those that the data set has.",
    )
    image_size: int = Field(32, ge=4, le=2048, description="The side of an image after augmentation, in pixels.")
    test_fraction: float = Field(
        0.2,
        ge=0.0,
        lt=1.0,
        description="The fraction of the images that becomes the test split if the source has no test split.",
    )
    val_fraction: float = Field(
        0.1,
        gt=0.0,
        lt=1.0,
        description="The fraction of the training split that is held out to choose settings on. "
        "Nothing is trained on held-out images, pretraining included.",
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
    max_bad_fraction: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="The largest fraction of images that cannot be decoded. More end the run.",
    )
    train_augment: Augment = Field(
        description="The [augmentations](#augmentations) of training images, in order. The first must be a crop."
    )
    eval_augment: Augment = Field(
        description="The [augmentations](#augmentations) of scored and embedded images. The first must be a crop."
    )

    _augment = field_validator("train_augment", "eval_augment")(check_augment)

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

    @model_validator(mode="after")
    def _check_annotations_source(self) -> "DatasetOptions":
        if self.annotations and self.source != "voc":
            raise ValueError(f"source {self.source!r} takes no dataset.annotations; valid: null, or source: voc")
        return self

    @model_validator(mode="after")
    def _check_locations(self) -> "DatasetOptions":
        if (self.list is None) != (self.source != "list"):
            needed = "dataset.list, a file of image paths" if self.source == "list" else "no dataset.list"
            raise ValueError(f"source {self.source!r} takes {needed}")
        if self.source == "digits" and self.root is not None:
            raise ValueError("source 'digits' takes no dataset.root: the images come with scikit-learn")
        if self.source not in ("digits", "list") and self.root is None:
            raise ValueError(f"source {self.source!r} takes dataset.root, the folder of the images")
        return self
