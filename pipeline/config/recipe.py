"""YAML + `key=value` overrides -> one frozen, typed `Recipe`.

A recipe is one YAML file. A mapping that has a `name` (`dataset`, `scale`, a stage's `method` or `task`) starts from the file of that
name in its group (`conf/dataset/<name>.yaml` ...); the recipe's own keys, then the overrides, are laid over it. `defaults.<kind>` is laid under
every stage of that kind. `smoke` is laid over the whole recipe for a trial run of a minute (`load(..., smoke=True)`).
"""

import copy
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)

from firstlight.pipeline import ROOT
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.messages import explain
from firstlight.pipeline.config.optim import Optimizer, Schedule
from firstlight.pipeline.data.augment.ops import CROPS, OPS, ten_crop
from firstlight.pipeline.data.sources import SOURCES
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.stages.projection import Projection
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.nn.encoders import ENCODERS, Shared
from firstlight.tasks.nn.feature_extractor import Pool
from firstlight.tasks.pretrain import METHODS

T = TypeVar("T")
GROUPS = ("dataset", "scale")  # top-level mappings that start from conf/<group>/<name>.yaml
STAGE_GROUPS = ("method", "task")  # the same inside a stage
KINDS = ("pretrain", "evaluate", "finetune", "retrieve", "embed", "export")
SMOKE: dict[str, Any] = {
    "seeds": [0],
    "storage": "runs",
    "scale": {"name": "local", "workers": 0},
}  # below every recipe's own `smoke`


class Strict(BaseModel):
    """Unknown keys, wrong types, NaN and infinity are errors; nothing can be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of `function` as fields of a model."""
    hints = get_type_hints(function, include_extras=True)
    keyword_only = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in keyword_only}


def _one_of(registry: Mapping[str, Callable[..., Any]], tag: str, **shared: Any) -> Any:
    """The union of the models of a registry's parameters; `tag: name` picks the member. `shared`: fields that every member has."""
    models = [
        create_model(f"{tag}_{name}", __base__=Strict, **{tag: (Literal[name], ...)}, **shared, **_parameters(entry))  # type: ignore[call-overload]
        for name, entry in registry.items()
    ]
    return Annotated[reduce(or_, models), Field(discriminator=tag)] if len(models) > 1 else models[0]


if TYPE_CHECKING:  # built from the registries: a type checker cannot follow
    AugmentOp: TypeAlias = Any
    MethodSpec: TypeAlias = Any
    TaskSpec: TypeAlias = Any
    EncoderSpec: TypeAlias = Any
    SourceName: TypeAlias = str
else:
    AugmentOp = _one_of(OPS, "op")
    MethodSpec = _one_of({name: cls.__init__ for name, cls in METHODS.items()}, "name")
    TaskSpec = _one_of({name: cls.__init__ for name, cls in TASKS.items()}, "name")
    EncoderSpec = _one_of(ENCODERS, "name", **_parameters(Shared))
    SourceName = Literal[tuple(SOURCES)]
Augment = tuple[AugmentOp, ...]


def _check_augment(ops: Augment) -> Augment:
    crops = [op.op for op in ops if op.op in CROPS]
    if len(crops) != 1 or ops[0].op not in CROPS:
        raise ValueError(f"must start with exactly one of {', '.join(sorted(CROPS))} (found {crops or 'none'})")
    return ops


def ten_crops(scale: float) -> list[Augment]:
    """Corners, centre and their mirror images."""
    return [TypeAdapter(Augment).validate_json(json.dumps(ops)) for ops in ten_crop(scale)]


class Dataset(Strict):
    """Where the images are, how they are split, and how one of them becomes `image_size` x `image_size` pixels."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")  # also of the store's folder
    source: SourceName
    root: str | None = Field(
        None, min_length=1
    )  # the folder of the images: a path, or a URI (s3://, gs://, http(s)://, file://)
    list: str | None = Field(
        None, min_length=1
    )  # source: list. A .csv, .tsv, .jsonl or .parquet file, by path or URI; its paths are below root, else beside it
    download: bool = False  # fetch a published set into root, where it is not there: cifar10, cifar100, stl10, svhn, mnist, voc2007, voc2012
    image_column: str = "image"  # source: parquet. Bytes, or a struct with a field `bytes`
    path_column: str = "path"  # source: list
    label_column: str | None = "label"  # source: parquet | list | webdataset (a field of the .json). null: no labels
    split_column: str | None = (
        None  # source: list. Holds train, test, val or validation; null: all rows are for training
    )
    annotations: tuple[Literal["boxes", "mask", "present"], ...] | None = (
        None  # source: voc. Or [mask]; []: none; null: what there is
    )
    image_size: int = Field(32, ge=4, le=2048)  # pixels, after augmentation
    test_fraction: float = Field(0.2, ge=0.0, lt=1.0)  # carved out of the source where it has no test split of its own
    val_fraction: float = Field(0.1, gt=0.0, lt=1.0)  # held out of the training split; never pretrained on
    split_seed: int = Field(0, ge=0)
    extends: str | None = Field(
        None, min_length=1
    )  # folder of an earlier store, whose images keep their ids; new ones come behind
    max_train: int | None = Field(
        None, ge=1
    )  # a stated subset of the training split, drawn by split_seed, oldest first where it was extended
    max_test: int | None = Field(None, ge=1)
    max_pixels: int = Field(64_000_000, ge=1)  # per image; larger ones are quarantined before they are decoded
    max_bad_fraction: float = Field(0.1, ge=0.0, le=1.0)  # more undecodable images than this end the run
    train_augment: Augment
    eval_augment: Augment

    _augment = field_validator("train_augment", "eval_augment")(_check_augment)

    @field_validator("root", "list", "extends")
    @classmethod
    def _home(cls, location: str | None) -> str | None:
        return location and os.path.expanduser(location)

    @field_validator("annotations")
    @classmethod
    def _once(cls, annotations: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if annotations and (
            len(set(annotations)) < len(annotations) or ("mask" in annotations and len(annotations) > 1)
        ):
            raise ValueError(
                f"{list(annotations)} is not valid: each once, and mask alone, as masks have classes and images of their own"
            )
        return annotations

    @model_validator(mode="after")
    def _annotatable(self) -> "Dataset":
        if self.annotations and self.source != "voc":
            raise ValueError(f"source {self.source!r} takes no dataset.annotations; valid: source voc, or null")
        return self

    @model_validator(mode="after")
    def _places(self) -> "Dataset":
        if (self.list is None) != (self.source != "list"):
            need = "dataset.list, a file of image paths" if self.source == "list" else "no dataset.list"
            raise ValueError(f"source {self.source!r} takes {need}")
        if self.source != "list" and (self.root is None) != (self.source == "digits"):
            need = (
                "no root: the images come with a dependency"
                if self.source == "digits"
                else "dataset.root, the folder of the images"
            )
            raise ValueError(f"source {self.source!r} takes {need}")
        return self


class Stream(Strict):
    """How images reach the workers. `window` trades memory for the quality of the shuffle."""

    window: int = Field(
        2048, ge=1
    )  # images that one task reads, shuffles and decodes; fewer where they are large (128 MB)
    shuffle: Literal["auto", "global", "windowed"] = (
        "auto"  # auto: global where all encoded images fit a task's cache (128 MB)
    )
    # Whether a training holds its images decoded on its device and augments them there; the pixels of every batch are the same.
    resident: Literal["auto", "on", "off"] = "auto"  # auto: images of one size that fit into resident_mb
    resident_mb: int = Field(
        512, ge=1
    )  # decoded images that a worker may hold; a GPU with memory to spare can take more
    # Where the images that are streamed are augmented; the pixels of every batch are the same.
    augment: Literal["cpu", "device"] = (
        "cpu"  # device: tasks decode, the training device augments (images of one size); for GPUs beside few CPUs
    )
    prefetch: int = Field(4, ge=1)  # batches decoded ahead of the training step
    task_cpus: float = Field(0.25, gt=0.0)  # CPUs that Ray counts for one decoding task
    tasks: int = Field(2, ge=1)  # decoding tasks at a time, per worker


class Scale(Strict):
    """Which machines, and how much of them."""

    name: str
    address: str = "local"  # local: Ray starts in this process; auto or an address: joins that cluster
    cpus: int | None = Field(None, ge=1)  # address: local only. Logical CPUs; null: as many as the machine has
    # Training processes; 0: in this process, without Ray; [fewest, most]: as many as there is room for, more or fewer as machines come and go
    workers: int | tuple[int, int] = 1
    resize_s: float = Field(60.0, gt=0.0)  # of workers: [fewest, most]: seconds between two looks at what room there is
    wait_s: int = Field(
        0, ge=0
    )  # seconds that a cluster which grows has to make room for the workers, before they are refused
    cpus_per_worker: float = Field(0.5, gt=0.0)
    gpus_per_worker: float = Field(0.0, ge=0.0)
    threads: int = Field(
        1, ge=1
    )  # torch threads of a worker. Part of the numerics: results are bit-equal for equal threads
    object_store_mb: int = Field(300, ge=80)  # address: local only
    max_failures: int = Field(3, ge=0)  # times the worker group is restarted from its last checkpoint
    collective_timeout_s: int = Field(600, ge=5)  # a rank that does not answer for so long ends the attempt

    @field_validator("workers", mode="plain")
    @classmethod
    def _number_or_range(cls, workers: Any) -> int | tuple[int, int]:
        numbers = workers if isinstance(workers, list | tuple) else [workers]
        if any(type(number) is not int for number in numbers):
            raise ValueError("must be a whole number, or two of them: [fewest, most]")
        if len(numbers) == 2 and 1 <= numbers[0] < numbers[1]:
            return numbers[0], numbers[1]
        if numbers is workers or workers < 0:
            raise ValueError("must be greater than or equal to 0, or [fewest, most] with 1 <= fewest < most")
        return int(workers)

    @field_serializer("workers")
    def _as_given(self, workers: int | tuple[int, int]) -> int | list[int]:
        return workers if isinstance(workers, int) else list(workers)

    @property
    def fewest(self) -> int:
        """Workers."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most(self) -> int:
        """Workers."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class Tracking(Strict):
    uri: str | None = None  # null: sqlite in `storage`
    experiment: str = "firstlight"


class Training(Strict):
    """One run of the loop in `fit.py`. `batch_size` is global: the sum over all workers."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    optimizer: Optimizer
    schedule: Schedule | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    clip_norm: float | None = Field(None, gt=0.0)  # a gradient that is longer is scaled down to this length
    accumulate: int = Field(
        1, ge=1
    )  # parts that a worker's share of a batch is embedded in: memory of one part, gradient of the whole
    checkpoint_every: int = Field(0, ge=0)  # steps; 0: at the end of an epoch, at most every 20 s
    log_every: int = Field(10, ge=1)  # steps
    augment: Augment | None = None  # null: dataset.train_augment

    @field_validator("augment")
    @classmethod
    def _augment(cls, ops: Augment | None) -> Augment | None:
        return ops if ops is None else _check_augment(ops)


class Watch(Strict):
    """What a pretraining tells of its features on the way, on held-out images; it changes nothing of the training."""

    every: int = Field(0, ge=0)  # epochs, and at the end; 0: never
    features: Literal["encoder", "head"] = "encoder"
    images: int = Field(5000, ge=2)  # held-out images, and training images of the bank, at most
    knn_k: int = Field(20, ge=1)
    knn_temperature: float = Field(0.1, gt=0.0)


LABEL_KEYS = ("labels_per_class", "labels_fraction", "labels_subset")


class FewLabels(Strict):
    """Which training images have labels that are learned from: at most one of the three keys, all null: every training image that has one."""

    labels_per_class: int | None = Field(None, ge=1)  # drawn by the seed
    labels_fraction: float | None = Field(
        None, gt=0.0, le=1.0
    )  # of every class, to the nearest image, at least one; drawn by the seed. 0.01: 1 %
    labels_subset: str | None = Field(
        None, min_length=1
    )  # a subset that the data set itself names; {seed} stands for the seed: fold{seed}

    @model_validator(mode="after")
    def _one_key(self) -> "FewLabels":
        given = self.labels_given
        if len(given) > 1:
            told = ", ".join(f"{key}: {value}" for key, value in given.items())
            raise ValueError(f"{told}: only one of {', '.join(LABEL_KEYS)} can be given, the others are null")
        return self

    @property
    def labels_given(self) -> dict[str, int | float | str]:
        """The one key that is given and its value; {} where all labels are learned from."""
        return {key: getattr(self, key) for key in LABEL_KEYS if getattr(self, key) is not None}


class Pretrain(Training, FewLabels):
    kind: Literal["pretrain"]
    method: MethodSpec
    watch: Watch = Watch()
    first_view: Literal["augmented", "plain"] = "augmented"  # plain: dataset.eval_augment; for methods of several views
    labelled_per_batch: int = Field(0, ge=0)  # R of the T = batch_size images of every batch; 0: no label is seen
    register_as: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )  # name in MLflow's model registry; alias `current`

    @property
    def measures(self) -> tuple[str, ...]:
        """The test accuracy of a classifier of its own, what the method tells of held-out images, the last value of what it logs of the training."""
        method = METHODS[self.method.name]
        return (*(("accuracy",) if self.labelled_per_batch else ()), *method.judged, *method.told)


def arguments(spec: Any) -> dict[str, Any]:
    """What the class that a method or task names is called with."""
    return {key: value for key, value in spec.model_dump().items() if key != "name"}


class Downstream(Strict):
    # previous: the pretraining stage before this one; runs:/<run>/encoder; models:/<name>@<alias> or models:/<name>/<version>
    encoder: str = Field("previous", pattern=r"^(previous|runs:/[^/]+/.+|models:/.+)$")

    @property
    def takes_encoder(self) -> bool:
        """False: every arm starts from fresh weights, and no pretraining is needed."""
        return True


class Look(Downstream):
    """A stage that looks at frozen features, beside those of the same network with random weights."""

    features: Literal["encoder", "head"] = "encoder"  # head: of the method, on the deepest map
    pool: Pool = "avg"  # of the encoder's maps. grid: averaged to the finest grid of at most 10,000 features
    batch_size: int = Field(256, ge=1)


class Evaluate(Look):
    """Weighted kNN and linear probe."""

    kind: Literal["evaluate"]
    layers: tuple[int, ...] = Field(
        (-1,), min_length=1
    )  # maps of the encoder: 0 is the first, -1 the deepest; each is evaluated
    knn_k: int = Field(200, ge=1)
    knn_temperature: float = Field(0.1, gt=0.0)
    probe_weight_decays: tuple[Annotated[float, Field(ge=0.0)], ...] = Field((1e-4, 1e-3, 1e-2, 1e-1), min_length=1)

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        return _without_repeats(layers, "a layer")

    @property
    def endings(self) -> tuple[str, ...]:
        """What follows the name of a measure of each layer in the results: nothing where there is one layer."""
        return ("",) if len(self.layers) == 1 else tuple(f"_layer{layer}" for layer in self.layers)

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(measure + ending for ending in self.endings for measure in ("knn", "probe"))


class Retrieve(Look):
    """An index of a gallery's features on disk, and how many of the nearest images to a query are of its class."""

    kind: Literal["retrieve"]
    layer: int = -1
    gallery: Literal["train", "test", "all"] = "train"  # all: of training, held-out and test images
    queries: Literal["val", "test"] = "test"  # one that is in the gallery does not find itself
    precision_at: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10, 20), min_length=1)  # numbers of neighbours

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(f"precision@{k}" for k in self.precision_at)


# What a fine-tuning starts from. pretrained: the encoder; pretrained_decoder: that, and the decoder handed on with it; scratch: fresh weights, drawn
# as `encoder.init` says; the others: drawn otherwise, lsuv by looking at the first training images
Arm = Literal["pretrained", "pretrained_decoder", "scratch", "gaussian", "he", "xavier", "lsuv"]


class Finetune(Training, Downstream, FewLabels):
    """A downstream task from the pretrained encoder, and from scratch with the same budget and the same choice of settings."""

    kind: Literal["finetune"]
    task: TaskSpec
    arms: tuple[Arm, ...] = Field(
        ("pretrained", "scratch"), min_length=1
    )  # the last is what the others are compared with
    test_crops: Literal[1, 10] = 1  # of a test image, averaged; 1: dataset.eval_augment
    test_crop: Literal["corners", "random"] = (
        "corners"  # which ten: corners, centre and their mirror images; or drawn as those of the training are
    )
    test_scale: float = Field(0.875, gt=0.0, le=1.0)  # of the sides of `corners` to the shorter side
    class_groups: dict[
        str, tuple[str, ...]
    ] = {}  # name -> classes that the measure is told of as well, such as animals: their mean is map_<name>
    learning_rates: tuple[
        Annotated[float, Field(gt=0.0)], ...
    ] = ()  # tried for both arms, chosen on held-out data; (): optimizer.lr

    @property
    def takes_encoder(self) -> bool:
        return any(arm.startswith("pretrained") for arm in self.arms)

    @field_validator("learning_rates")
    @classmethod
    def _told_apart(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{rate:g}" for rate in rates}) != len(rates):
            raise ValueError("must differ in their first six digits: the trainings are named by them")
        return rates

    @property
    def measures(self) -> tuple[str, ...]:
        """What the table shows: the task's measure, and that of each group of classes."""
        measure = TASKS[self.task.name].measure
        return (measure, *(f"{measure}_{group}" for group in self.class_groups))

    @model_validator(mode="after")
    def _ten(self) -> "Finetune":
        if self.test_crop == "random" and self.test_crops == 1:
            raise ValueError("test_crop: 'random' is not valid with test_crops: 1; valid: corners, or test_crops: 10")
        return self

    @field_validator("class_groups")
    @classmethod
    def _named(cls, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, members in groups.items():
            if not re.fullmatch(r"[a-z][a-z0-9]*", name):
                raise ValueError(f"{name!r} is no name of a group; valid: small letters and digits")
            if not members:
                raise ValueError(f"{name} has no classes")
            _without_repeats(members, "a class")
        return groups

    @field_validator("arms")
    @classmethod
    def _distinct(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        if len(set(arms)) != len(arms):
            raise ValueError("must not name an arm twice")
        return arms


class Embed(Downstream):
    """Embeddings of the images of a store, as Parquet."""

    kind: Literal["embed"]
    splits: tuple[Literal["train", "val", "test"], ...] = Field(("train", "val", "test"), min_length=1)
    batch_size: int = Field(256, ge=1)  # images that a worker embeds at a time: part of the numerics
    dtype: Literal["float32", "float16"] = "float32"  # of the embeddings in the files
    rows_per_file: int = Field(16384, ge=1)  # a killed stage goes on behind its last whole file
    map: Projection = "pca"  # how the picture of the embeddings lays them on a plane
    map_classes: tuple[str, ...] = ()  # the classes that it shows; (): all

    @field_validator("splits", "map_classes")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _without_repeats(names, "a name")


class Export(Downstream):
    """The encoder as others take it: state dicts of torchvision and timm, safetensors, ONNX, torch.export; and a model card."""

    kind: Literal["export"]
    formats: tuple[Literal["torchvision", "timm", "safetensors", "onnx", "torch_export"], ...] | None = Field(
        None, min_length=1
    )  # null: all it has

    @field_validator("formats")
    @classmethod
    def _distinct(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return formats and _without_repeats(formats, "a name")


def _without_repeats(values: tuple[T, ...], what: str) -> tuple[T, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"must not repeat {what}")
    return values


Stage = Annotated[Pretrain | Evaluate | Finetune | Retrieve | Embed | Export, Field(discriminator="kind")]


class Expected(Strict):
    """A number that the paper reports, for the table to set beside what was measured. In percent; `psnr` in dB."""

    stage: str
    measure: str  # one of the stage's `measures`
    arm: Arm = "pretrained"  # of a finetune stage
    paper: float
    against: float | None = None  # the paper's number for the baseline: the last arm, or random weights
    source: str = Field(min_length=1)  # where the paper says so


class Needs(Strict):
    """What a full run of a recipe takes."""

    data: str = Field(min_length=1)
    gpus: int = Field(ge=0)
    hours: float = Field(gt=0.0)  # of wall time on so many GPUs (0: on two CPU cores); an estimate
    estimate: str = Field(min_length=1)  # what `hours` was estimated from
    after: tuple[
        str, ...
    ] = ()  # recipes that must have run before, in the same storage: their encoders are referred to


class Recipe(Strict):
    """Stages in order, on one dataset, with one encoder, at one scale."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    storage: Path = Path("runs")
    tracking: Tracking = Tracking()
    dataset: Dataset
    encoder: EncoderSpec
    stream: Stream = Stream()
    scale: Scale
    stages: dict[str, Stage] = Field(min_length=1)
    score_test: bool = (
        True  # false: the test split is left alone, stages score held-out images only; so are the trials of a search
    )
    expected: tuple[Expected, ...] = ()
    needs: Needs | None = None

    @field_validator("name")
    @classmethod
    def _no_dots(cls, name: str) -> str:
        if ".." in name:
            raise ValueError("must not contain '..'")
        return name

    @field_validator("stages")
    @classmethod
    def _stage_names(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        """They are parts of folders' names, and of dotted keys."""
        for name in stages:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(
                    f"{name[:64]!r} is no name of a stage; valid: up to 64 letters, digits, _ and -, a letter or digit first"
                )
        return stages

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _without_repeats(seeds, "a seed")

    @model_validator(mode="after")
    def _order(self) -> "Recipe":
        seen_pretrain = False
        for name, stage in self.stages.items():
            seen_pretrain |= stage.kind == "pretrain"
            if (
                isinstance(stage, Downstream)
                and stage.takes_encoder
                and stage.encoder == "previous"
                and not seen_pretrain
            ):
                raise ValueError(
                    f"stages.{name}.encoder: 'previous' needs a pretrain stage before it; or give runs:/... or models:/..."
                )
        return self

    @model_validator(mode="after")
    def _expected(self) -> "Recipe":
        for k, row in enumerate(self.expected):
            if row.stage not in self.stages:
                raise ValueError(
                    f"expected.{k}.stage: {row.stage!r} is no stage of this recipe; {suggest_valid(row.stage, self.stages)}"
                )
            stage = self.stages[row.stage]
            arms = stage.arms if isinstance(stage, Finetune) else ("pretrained",)
            if row.arm not in arms:
                raise ValueError(
                    f"expected.{k}.arm: {row.arm!r} is none of stages.{row.stage}; {suggest_valid(row.arm, arms)}"
                )
            measures = () if isinstance(stage, Embed | Export) else stage.measures
            if row.measure not in measures:
                raise ValueError(
                    f"expected.{k}.measure: {row.measure!r} is not measured by stages.{row.stage}; {suggest_valid(row.measure, measures or ['nothing'])}"
                )
        return self

    @model_validator(mode="after")
    def _left_alone(self) -> "Recipe":
        for name, stage in self.stages.items() if not self.score_test else ():
            for key, valid in (("queries", "val"), ("gallery", "train")) if isinstance(stage, Retrieve) else ():
                if getattr(stage, key) != valid:
                    raise ValueError(
                        f"stages.{name}.{key}: {getattr(stage, key)!r} reads test images, and score_test is false; valid: {valid}"
                    )
        return self

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON types; `parse(dump(x)) == x`."""
        return self.model_dump(mode="json")


def load(
    path: Path, overrides: tuple[str, ...] = (), smoke: bool = False, values: Mapping[str, Any] | None = None
) -> Recipe:
    """Read, compose and check a recipe; `smoke`: its trial run, of another name. `values`: by dotted key, laid over it below the overrides.

    Raises:
        UserError: one line per mistake, each naming the dotted key, the value and what would be valid.
    """
    raw = yaml_reader.read(path)
    raw = _smoke(raw) if smoke else raw
    for key, value in (values or {}).items():
        _set(raw, key.split("."), copy.deepcopy(value))
    override(raw, overrides)
    return parse(_compose(raw, conf_root(path)))


def override(raw: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Lay `key=value` over a mapping, in place.

    Raises:
        UserError: no such stage; a value where a section is meant.
    """
    for word in overrides:
        _set(raw, *split_override(word))


def parse(raw: dict[str, Any]) -> Recipe:
    """Check a composed mapping.

    Raises:
        UserError: as `load`.
    """
    try:
        return Recipe.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise UserError(explain(error, raw, Recipe)) from None


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form: equal values have equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _smoke(raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its section `smoke`, of dotted or nested keys, laid over it. The models that it registers and refers to have names of their
    own: a trial must not take the place of what a full run has registered.
    """
    changes = raw.get("smoke")
    if not isinstance(changes, dict):
        raise UserError(
            f"smoke: {'is no section' if 'smoke' in raw else 'is missing'}: this recipe does not say what a trial run of it is"
        )
    raw = {**raw, "name": f"{raw.get('name')}-smoke"}
    for dotted, value in {**SMOKE, **changes}.items():
        raw = _merge(raw, reduce(lambda inner, key: {key: inner}, reversed(dotted.split(".")), value))
    sections = (raw[group] for group in ("stages", "defaults") if isinstance(raw.get(group), dict))
    for stage in (stage for section in sections for stage in section.values() if isinstance(stage, dict)):
        if isinstance(stage.get("register_as"), str):
            stage["register_as"] += "-smoke"
        if isinstance(stage.get("encoder"), str):
            stage["encoder"] = re.sub(r"^models:/([^/@]+)", r"models:/\1-smoke", stage["encoder"])
    return raw


def split_override(override: str) -> tuple[list[str], Any]:
    """The parts of the key, and the value, of `key=value`.

    Raises:
        UserError: it is no such thing.
    """
    key, sign, value = override.partition("=")
    if not sign or not key or not all(key.split(".")):
        raise UserError(f"{override!r}: an override is key=value, e.g. scale.workers=2")
    return key.split("."), yaml_reader.parse(value, where=key)


def _set(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    stages = raw.get("stages")
    if keys[0] == "stages" and len(keys) > 1 and isinstance(stages, dict) and keys[1] not in stages:
        raise UserError(f"stages.{keys[1]}: no such stage in this recipe; {suggest_valid(keys[1], stages)}")
    for depth, key in enumerate(keys[:-1], 1):
        if raw.get(key) is None:
            raw[key] = {}
        elif isinstance(raw[key], str) and key in (*GROUPS, *STAGE_GROUPS):
            raw[key] = {"name": raw[key]}
        raw = raw[key]
        if not isinstance(raw, dict):
            raise UserError(
                f"{'.'.join(keys[:depth])}: is the value {raw!r}, not a section, so {'.'.join(keys)!r} cannot be set"
            )
    raw[keys[-1]] = value


def conf_root(recipe: Path) -> Path:
    """The `conf` folder that the recipe lies in, else the one that ships with Firstlight."""
    for parent in recipe.resolve().parents:
        if parent.name == "conf":
            return parent
    return ROOT / "conf"


def _compose(raw: dict[str, Any], conf: Path) -> dict[str, Any]:
    defaults = raw.get("defaults", {})
    if not isinstance(defaults, dict) or not all(isinstance(section, dict) for section in defaults.values()):
        raise UserError("defaults: must be sections of settings, one for a kind of stage, e.g. defaults.finetune")
    for kind in defaults:
        if kind not in KINDS:
            raise UserError(f"defaults.{kind}: no such kind of stage; {suggest_valid(kind, KINDS)}")
    out = {
        key: _with_group(conf, key, value, key) if key in GROUPS else value
        for key, value in raw.items()
        if key not in ("defaults", "smoke")
    }
    stages = out.get("stages")
    if isinstance(stages, dict):
        out["stages"] = {name: _compose_stage(conf, name, stage, defaults) for name, stage in stages.items()}
    return out


def _compose_stage(conf: Path, name: str, stage: Any, defaults: dict[str, dict[str, Any]]) -> Any:
    stage = {} if stage is None else stage
    if not isinstance(stage, dict):
        return stage
    stage = {"kind": name, **stage}
    stage = _merge(defaults.get(str(stage["kind"]), {}), stage)
    groups = {key: _with_group(conf, key, stage[key], f"stages.{name}.{key}") for key in STAGE_GROUPS if key in stage}
    return {**stage, **groups}


def _with_group(conf: Path, group: str, value: Any, where: str) -> Any:
    """`value` laid over conf/<group>/<value's name>.yaml; a bare string is short for {name: string}."""
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return value
    known = {file.stem: file for file in sorted((conf / group).glob("*.yaml"))}
    if value["name"] not in known:
        if group == "dataset" and "source" in value:  # one of the user's own, whole in the recipe
            return value
        raise UserError(f"{where}.name: {value['name']!r} is unknown; {suggest_valid(value['name'], known)}")
    base = yaml_reader.read(known[value["name"]])
    return _merge(
        base, {**value, "name": base["name"]}
    )  # a file may set up something of another name: instance.yaml is a super_and


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section; a section of another `name` (another optimiser, say) takes the place of the one below it."""
    if "name" in over and over["name"] != base.get("name", over["name"]):
        return over
    both = {
        key: _merge(base[key], over[key])
        for key in base.keys() & over.keys()
        if isinstance(base[key], dict) and isinstance(over[key], dict)
    }
    return {**base, **over, **both}
